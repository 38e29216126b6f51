// A recursive-descent parser that makes a tree, a compiler that lays the tree out as a program of a nondeterministic automaton, and
// the simulation of all its states side by side (Thompson 1968). See pattern.h for what is supported and why.
#include "io/pattern.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "core/check.h"

namespace loquetier {

namespace {

constexpr size_t kMaxExpression = 16384;  // characters
constexpr int kMaxNesting = 64;           // groups in groups
constexpr size_t kMaxProgram = 16384;     // instructions, repetitions counted out
constexpr int kMaxRepeat = 4096;

using ByteSet = std::bitset<256>;

bool is_digit(unsigned char c) { return c >= '0' && c <= '9'; }
bool is_letter(unsigned char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_word(unsigned char c) { return is_digit(c) || is_letter(c) || c == '_'; }
bool is_space(unsigned char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

template <class Member>
ByteSet set_where(Member member) {
  ByteSet set;
  for (int c = 0; c < 256; ++c) set[static_cast<size_t>(c)] = member(static_cast<unsigned char>(c));
  return set;
}

struct Node {
  enum class Kind { set, sequence, choice, repeat, begin, end, word_edge, no_word_edge, look, look_not } kind = Kind::sequence;
  ByteSet set;
  std::vector<std::unique_ptr<Node>> children;
  int min = 0, max = 0;  // repeat; max -1: no limit
};
using NodePtr = std::unique_ptr<Node>;

NodePtr make_node(Node::Kind kind) {
  auto node = std::make_unique<Node>();
  node->kind = kind;
  return node;
}

class PatternParser {
 public:
  PatternParser(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  NodePtr parse() {
    NodePtr node = choice();
    if (!at_end()) fail("unbalanced ')'");
    return node;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw InvalidArgument(concat("[", where_, "] expression '", text_.substr(0, 200), "': ", what, " at character ", at_));
  }
  bool at_end() const { return at_ == text_.size(); }
  bool next_is(std::string_view token) const { return text_.substr(at_).starts_with(token); }
  bool take(std::string_view token) {
    if (!next_is(token)) return false;
    at_ += token.size();
    return true;
  }

  NodePtr choice() {
    auto node = make_node(Node::Kind::choice);
    do node->children.push_back(sequence());
    while (take("|"));
    return node->children.size() == 1 ? std::move(node->children.front()) : std::move(node);
  }

  NodePtr sequence() {
    auto node = make_node(Node::Kind::sequence);
    while (!at_end() && !next_is("|") && !next_is(")")) {
      NodePtr item = atom();
      if (auto bounds = quantifier()) {
        if (!item || item->kind == Node::Kind::begin || item->kind == Node::Kind::end || item->kind == Node::Kind::word_edge ||
            item->kind == Node::Kind::no_word_edge) {
          fail("nothing to repeat");
        }
        take("?");  // lazy: the same matches
        if (next_is("+")) fail("possessive quantifiers are not supported");
        if (quantifier()) fail("multiple repeat");
        auto repeat = make_node(Node::Kind::repeat);
        repeat->min = bounds->first;
        repeat->max = bounds->second;
        repeat->children.push_back(std::move(item));
        item = std::move(repeat);
      }
      if (item) node->children.push_back(std::move(item));
    }
    return node;
  }

  // {min, max}; a brace that is not of the form {m}, {m,}, {,n} or {m,n} is a literal, as in Python.
  std::optional<std::pair<int, int>> quantifier() {
    if (take("*")) return {{0, -1}};
    if (take("+")) return {{1, -1}};
    if (take("?")) return {{0, 1}};
    if (!next_is("{")) return std::nullopt;
    const size_t begin = at_;
    ++at_;
    const std::optional<int> low = number();
    std::optional<int> high = low;
    const bool comma = take(",");
    if (comma) high = number();
    if (!take("}") || (!low && !comma)) {
      at_ = begin;
      return std::nullopt;
    }
    if (high && low.value_or(0) > *high) fail("min repeat greater than max repeat");
    return {{low.value_or(0), high.value_or(-1)}};
  }

  std::optional<int> number() {
    if (at_end() || !is_digit(static_cast<unsigned char>(text_[at_]))) return std::nullopt;
    int value = 0;
    for (; !at_end() && is_digit(static_cast<unsigned char>(text_[at_])); ++at_) {
      value = value * 10 + (text_[at_] - '0');
      if (value > kMaxRepeat) fail(concat("more than ", kMaxRepeat, " repetitions"));
    }
    return value;
  }

  NodePtr set_node(const ByteSet& set) {
    auto node = make_node(Node::Kind::set);
    node->set = set;
    return node;
  }

  NodePtr atom() {
    const char c = text_[at_];
    if (c == '*' || c == '+' || c == '?') fail("nothing to repeat");
    ++at_;
    switch (c) {
      case '.':
        return set_node(~ByteSet().set('\n'));
      case '^':
        return make_node(Node::Kind::begin);
      case '$':
        return make_node(Node::Kind::end);
      case '(':
        return group();
      case '[':
        return set_node(bracket());
      case '\\':
        break;
      default:
        return set_node(ByteSet().set(static_cast<unsigned char>(c)));
    }
    if (take("A")) return make_node(Node::Kind::begin);
    if (take("Z")) return make_node(Node::Kind::end);
    if (take("b")) return make_node(Node::Kind::word_edge);
    if (take("B")) return make_node(Node::Kind::no_word_edge);
    if (!at_end() && text_[at_] >= '1' && text_[at_] <= '9') fail("back-references are not supported");
    return set_node(escape());
  }

  NodePtr group() {
    if (++nesting_ > kMaxNesting) fail(concat("groups nested deeper than ", kMaxNesting));
    Node::Kind kind = Node::Kind::sequence;
    if (take("?")) {
      if (take("=")) {
        kind = Node::Kind::look;
      } else if (take("!")) {
        kind = Node::Kind::look_not;
      } else if (take("P<")) {
        const size_t end = text_.find('>', at_);
        if (end == std::string_view::npos || end == at_) fail("bad group name");
        at_ = end + 1;
      } else if (next_is("<=") || next_is("<!")) {
        fail("lookbehind is not supported");
      } else if (!take(":")) {
        fail("only (?:…), (?P<name>…), (?=…) and (?!…) are supported after '(?'");
      }
    }
    NodePtr inner = choice();
    if (!take(")")) fail("missing ')'");
    --nesting_;
    auto node = make_node(kind);  // a sequence of one keeps a group one item, even an empty one
    node->children.push_back(std::move(inner));
    return node;
  }

  // The characters of an escape, after the backslash.
  ByteSet escape() {
    if (at_end()) fail("a backslash at the end");
    const char c = text_[at_++];
    switch (c) {
      case 'd':
        return set_where(is_digit);
      case 'D':
        return ~set_where(is_digit);
      case 'w':
        return set_where(is_word);
      case 'W':
        return ~set_where(is_word);
      case 's':
        return set_where(is_space);
      case 'S':
        return ~set_where(is_space);
      default:
        break;
    }
    constexpr std::string_view kNames = "nrtfva", kValues = "\n\r\t\f\v\a";
    const size_t named = kNames.find(c);
    if (named == std::string_view::npos && (is_letter(static_cast<unsigned char>(c)) || is_digit(static_cast<unsigned char>(c))))
      fail(concat("the escape \\", c, " is not supported"));
    ByteSet set;
    set.set(static_cast<unsigned char>(named == std::string_view::npos ? c : kValues[named]));
    return set;
  }

  ByteSet bracket() {
    const bool negated = take("^");
    ByteSet set;
    for (bool first = true; first || !next_is("]"); first = false) {
      if (at_end()) fail("missing ']'");
      const ByteSet low = bracket_item();
      if (next_is("-") && at_ + 1 < text_.size() && text_[at_ + 1] != ']') {
        ++at_;
        const ByteSet high = bracket_item();
        if (low.count() != 1 || high.count() != 1 || low._Find_first() > high._Find_first()) fail("bad character range");
        for (size_t b = low._Find_first(); b <= high._Find_first(); ++b) set.set(b);
      } else {
        set |= low;
      }
    }
    take("]");
    return negated ? ~set : set;
  }

  ByteSet bracket_item() {
    if (take("\\b")) return ByteSet().set('\b');
    if (take("\\")) return escape();
    if (at_end()) fail("missing ']'");
    return ByteSet().set(static_cast<unsigned char>(text_[at_++]));
  }

  std::string_view text_;
  const std::string& where_;
  size_t at_ = 0;
  int nesting_ = 0;
};

}  // namespace

// Lays a tree out as a program; a sub-program falls through to what stands behind it.
class PatternCompiler {
 public:
  PatternCompiler(Pattern& pattern, std::string_view text, const std::string& where)
      : pattern_(pattern), text_(text), where_(where) {}

  void compile(const Node& node) {
    using Kind = Node::Kind;
    using Op = Pattern::Op;
    require(++visits_ <= 4 * kMaxProgram, "[", where_, "] expression '", text_.substr(0, 200),
            "': too many repetitions");  // of nothing
    switch (node.kind) {
      case Kind::set:
        emit(Op::one_of, add_set(node.set));
        break;
      case Kind::sequence:
        for (const NodePtr& child : node.children) compile(*child);
        break;
      case Kind::choice:
        compile_choice(node);
        break;
      case Kind::repeat:
        compile_repeat(*node.children.front(), node.min, node.max);
        break;
      case Kind::begin:
        emit(Op::begin);
        break;
      case Kind::end:
        emit(Op::end);
        break;
      case Kind::word_edge:
        emit(Op::word_edge);
        break;
      case Kind::no_word_edge:
        emit(Op::no_word_edge);
        break;
      case Kind::look:
      case Kind::look_not: {
        const int32_t look = emit(node.kind == Kind::look ? Op::look : Op::look_not, 0, pattern_.looks_++);
        const int32_t jump = emit(Op::jump);
        pattern_.program_[look].x = here();
        compile(*node.children.front());
        emit(Op::match);
        pattern_.program_[jump].x = here();
        break;
      }
    }
  }

  int32_t emit(Pattern::Op op, int32_t x = 0, int32_t y = 0) {
    require(pattern_.program_.size() < kMaxProgram, "[", where_, "] expression '", text_.substr(0, 200), "': more than ",
            kMaxProgram, " steps when its repetitions are counted out");
    pattern_.program_.push_back({op, x, y});
    return here() - 1;
  }

 private:
  int32_t here() const { return static_cast<int32_t>(pattern_.program_.size()); }

  int32_t add_set(const ByteSet& set) {
    const auto found = std::find(pattern_.sets_.begin(), pattern_.sets_.end(), set);
    if (found != pattern_.sets_.end()) return static_cast<int32_t>(found - pattern_.sets_.begin());
    pattern_.sets_.push_back(set);
    return static_cast<int32_t>(pattern_.sets_.size()) - 1;
  }

  void compile_choice(const Node& node) {
    std::vector<int32_t> ends;
    for (const NodePtr& child : node.children) {
      const bool last = &child == &node.children.back();
      const int32_t split = last ? -1 : emit(Pattern::Op::split);
      if (!last) pattern_.program_[split].x = here();
      compile(*child);
      if (last) break;
      ends.push_back(emit(Pattern::Op::jump));
      pattern_.program_[split].y = here();
    }
    for (int32_t end : ends) pattern_.program_[end].x = here();
  }

  void compile_repeat(const Node& child, int min, int max) {
    for (int i = 0; i < min; ++i) compile(child);
    if (max < 0) {
      const int32_t split = emit(Pattern::Op::split);
      pattern_.program_[split].x = here();
      compile(child);
      emit(Pattern::Op::jump, split);
      pattern_.program_[split].y = here();
    } else {
      std::vector<int32_t> splits;
      for (int i = min; i < max; ++i) {
        splits.push_back(emit(Pattern::Op::split));
        pattern_.program_[splits.back()].x = here();
        compile(child);
      }
      for (int32_t split : splits) pattern_.program_[split].y = here();
    }
  }

  Pattern& pattern_;
  std::string_view text_;
  const std::string& where_;
  size_t visits_ = 0;
};

Pattern::Pattern(std::string_view expression, const std::string& where) {
  require(expression.size() <= kMaxExpression, "[", where, "] expression: expected at most ", kMaxExpression, " characters, got ",
          expression.size());
  const NodePtr tree = PatternParser(expression, where).parse();
  PatternCompiler compiler(*this, expression, where);
  compiler.compile(*tree);
  compiler.emit(Op::match);
}

// One simulation over one text. Lookaheads run their own sub-program from where they stand; their outcome is kept per position.
struct Pattern::Run {
  const Pattern& pattern;
  std::string_view text;
  std::vector<int8_t> known;  // [looks, text + 1]: -1 unknown, else the outcome

  Run(const Pattern& p, std::string_view t) : pattern(p), text(t), known(static_cast<size_t>(p.looks_) * (t.size() + 1), -1) {}

  bool word_at(size_t position) const { return position < text.size() && is_word(static_cast<unsigned char>(text[position])); }
  bool word_edge(size_t position) const { return (position > 0 && word_at(position - 1)) != word_at(position); }

  bool looks(const Instruction& look, size_t position) {
    int8_t& outcome = known[static_cast<size_t>(look.y) * (text.size() + 1) + position];
    if (outcome < 0) outcome = matches(look.x, position, false) ? 1 : 0;
    return (outcome == 1) == (look.op == Op::look);
  }

  bool matches(int32_t start, size_t position, bool whole) {
    std::vector<int32_t> states, open = {start};
    std::vector<size_t> seen(pattern.program_.size(), SIZE_MAX);  // the position a state was last reached at
    for (;; ++position) {
      // Follow everything that reads no character.
      while (!open.empty()) {
        const int32_t at = open.back();
        open.pop_back();
        if (seen[at] == position) continue;
        seen[at] = position;
        const Instruction& step = pattern.program_[at];
        switch (step.op) {
          case Op::one_of:
            states.push_back(at);
            break;
          case Op::jump:
            open.push_back(step.x);
            break;
          case Op::split:
            open.push_back(step.y);
            open.push_back(step.x);
            break;
          case Op::begin:
            if (position == 0) open.push_back(at + 1);
            break;
          case Op::end:
            if (position == text.size()) open.push_back(at + 1);
            break;  // names hold no line breaks
          case Op::word_edge:
            if (word_edge(position)) open.push_back(at + 1);
            break;
          case Op::no_word_edge:
            if (!word_edge(position)) open.push_back(at + 1);
            break;
          case Op::look:
          case Op::look_not:
            if (looks(step, position)) open.push_back(at + 1);
            break;
          case Op::match:
            if (!whole || position == text.size()) return true;
            break;
        }
      }
      if (position == text.size() || states.empty()) return false;
      const auto character = static_cast<unsigned char>(text[position]);
      for (int32_t at : states)
        if (pattern.sets_[pattern.program_[at].x][character]) open.push_back(at + 1);
      states.clear();
    }
  }
};

bool Pattern::full_match(std::string_view text) const { return Run(*this, text).matches(0, 0, true); }
bool Pattern::prefix_match(std::string_view text) const { return Run(*this, text).matches(0, 0, false); }

}  // namespace loquetier
