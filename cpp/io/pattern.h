// Regular expressions as Python's `re` reads them, for module names: adapter folders come from anywhere, so matching takes time
// linear in the expression (no backtracking) and compiling has fixed limits. Supported: literals, classes, groups, alternation,
// every quantifier but possessive ones, ^ $ \A \Z \b \B, lookahead. Refused by name: back-references, lookbehind, inline flags,
// atomic groups, conditionals. Whether a name matches is all that is asked, so greediness does not matter and groups capture
// nothing. Internal to io.
#pragma once

#include <bitset>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace loquetier {

class Pattern {
 public:
  // InvalidArgument "[where] expression: …" when the expression is malformed, unsupported or too large.
  Pattern(std::string_view expression, const std::string& where);

  bool full_match(std::string_view text) const;    // re.fullmatch
  bool prefix_match(std::string_view text) const;  // re.match

 private:
  friend class PatternCompiler;
  enum class Op : uint8_t { one_of, split, jump, begin, end, word_edge, no_word_edge, look, look_not, match };
  struct Instruction {
    Op op = Op::match;
    int32_t x = 0;  // set of one_of; targets of split and jump; program start of look
    int32_t y = 0;  // second target of split; index of look among the lookaheads
  };
  struct Run;

  std::vector<Instruction> program_;
  std::vector<std::bitset<256>> sets_;
  int32_t looks_ = 0;
};

}  // namespace loquetier
