#include "fused_schedule.h"

#include <algorithm>

namespace loquetier::cuda {

namespace {

constexpr int32_t kMostParts = 4;
// Lending sums, and adding them, in steps of a pair: together about 8 us measured on an H200, where a step takes 0.7 us.
constexpr int32_t kLend = 6, kAdd = 5;
// A step of a half item is half the work but loads as much of w into a processor: 0.57 to 0.64 of a pair's, by the times of 2,112
// rows.
constexpr int32_t kHalfTenths = 6;
constexpr int32_t half_steps(int32_t steps) { return steps * kHalfTenths / 10; }

// Behind more turns two half items on a cluster go between its other items in place of at the end.
constexpr int32_t kFewTurns = 3;

// An item's steps in parts. With `rounds` the helpers are fewer than the items: there are two parts, and a helper has the first,
// shorter one of several items.
struct Division {
  int32_t parts = 1;
  int32_t rounds = 1;
  int32_t length = 0;  // steps of the busiest cluster, lending and adding included
  int32_t cut = 0;     // steps of all parts but the last, where they are not as long as that
  int32_t begin(int32_t part, int32_t steps) const {
    return cut > 0 ? part * cut : part * steps / (rounds > 1 ? rounds + 1 : parts);
  }
};

// `scale`: steps of these items in the time of a pair's.
Division division(int32_t items, int32_t helpers, int32_t steps, int32_t scale) {
  Division best{1, 1, steps};
  if (items == 0 || helpers <= 0) return best;
  for (int32_t parts = 2; parts <= std::min(kMostParts, 1 + helpers / items); ++parts) {
    const Division some{parts, 1, (steps + parts - 1) / parts + (parts - 1) * (kLend + kAdd) * scale};
    if (some.length < best.length) best = some;
  }
  if (helpers < items) {
    const int32_t rounds = (items + helpers - 1) / helpers, first = steps / (rounds + 1);
    const Division some{2, rounds, std::max(steps - first + (kLend + kAdd) * scale, rounds * (first + kLend * scale))};
    if (some.length < best.length) best = some;
  }
  return best;
}

// Two half items on one cluster: the second one's first steps may be lent by some of `wholes` clusters that have a whole item each.
// `items`: such second ones.
Division relief(int32_t items, int32_t wholes, int32_t steps) {
  Division best{1, 1, 2 * half_steps(steps)};
  if (items == 0) return best;
  for (int32_t lent = 1; lent < kMostParts && lent * items <= wholes; ++lent) {
    // Where both end together: steps + half_steps(cut) + kLend = 2 half_steps(steps) - lent * (half_steps(cut) - kAdd).
    const int32_t more = 2 * half_steps(steps) + lent * kAdd - steps - kLend, cut = more * 10 / (kHalfTenths * (lent + 1));
    if (cut < 1 || lent * cut >= steps) continue;
    const Division some{lent + 1, 1, steps + half_steps(cut) + kLend, cut};
    if (some.length + kLend < best.length) best = some;
  }
  return best;
}

class Scheduler {
 public:
  Scheduler(FusedArgs& args, int32_t most) : args_(args), schedule_(args.schedule), most_(most) {}

  int32_t run() {
    const int32_t items = fused_items(args_), halves = args_.table.half >= 0 ? (args_.column_tiles + 1) / 2 : 0;
    const int32_t wholes = items - halves, left = wholes % most_, free = most_ - left;
    schedule_.dealt = wholes - left;
    std::fill_n(schedule_.before, most_, static_cast<uint16_t>(schedule_.dealt / most_));
    if (left == 0) {
      share(0, halves);
    } else if (halves <= 2 * free) {
      // Half items on clusters of their own, one on each or two; the others help with the whole ones.
      const auto with = [&](int32_t each) { return division(left, free - (halves + each - 1) / each, args_.steps, 1); };
      const Division one = with(1), two = with(2);
      const bool ones = halves <= free && one.length <= std::max(two.length, 2 * half_steps(args_.steps));
      const bool few_turns = schedule_.dealt <= kFewTurns * most_;
      const Division lent = ones || two.parts > 1 || !few_turns ? Division{} : relief(halves / 2, left, args_.steps);
      if (lent.parts > 1) {
        relieve(left, halves, lent);
      } else {
        deal(0, left, ones ? one : two);
        const int32_t apart = used_;
        pile(left, halves, ones ? 1 : 2, apart);
        spread_out(apart);
      }
    } else {
      // Half items fill the turn, and what remains of them comes behind it.
      const int32_t twos = 2 * free;
      deal(0, left, {});
      pile(left, twos, 2, left);
      share(left + twos, halves - twos);
    }
    collect();
    return schedule_.dealt > 0 ? most_ : used_;
  }

 private:
  struct Entry {
    FusedPiece piece;
    int32_t cluster;
  };

  void add(int32_t cluster, int32_t item, int32_t part, const Division& d) {
    const bool last = part + 1 == d.parts;
    entries_[count_++] = {{static_cast<uint16_t>(item), static_cast<uint16_t>(d.begin(part, args_.steps)),
                           static_cast<uint16_t>(last ? args_.steps : d.begin(part + 1, args_.steps)), static_cast<uint16_t>(part)},
                          cluster};
    used_ = std::max(used_, cluster + 1);
  }
  // Items from `first` on for the first clusters. Whoever waits for lent sums comes behind those who lend: they have been running
  // before it, so that it waits for them even where not all clusters run at a time.
  void deal(int32_t first, int32_t items, const Division& d) {
    const int32_t helpers = (items + d.rounds - 1) / d.rounds, lenders = (d.parts - 1) * helpers;
    if (lenders > 0) {
      schedule_.divided = first;
      schedule_.parts = d.parts;
    }
    for (int32_t part = 0; part + 1 < d.parts; ++part)
      for (int32_t i = 0; i < items; ++i) add(part * helpers + i % helpers, first + i, part, d);
    for (int32_t i = 0; i < items; ++i) add(lenders + i, first + i, d.parts - 1, d);
  }
  // Items from `first` on, `each` of them for a cluster, from `cluster` on.
  void pile(int32_t first, int32_t items, int32_t each, int32_t cluster) {
    for (int32_t i = 0; i < items; ++i) add(cluster + i / each, first + i, 0, {});
  }
  // Whole items on as many clusters, then two half items on each of the next, the second ones divided: all but their last part on
  // the clusters of the whole items.
  void relieve(int32_t wholes, int32_t halves, const Division& d) {
    const int32_t seconds = halves / 2, firsts = halves - seconds;
    schedule_.divided = wholes + firsts;
    schedule_.parts = d.parts;
    for (int32_t part = 0; part + 1 < d.parts; ++part)
      for (int32_t i = 0; i < seconds; ++i) add(part * seconds + i, wholes + firsts + i, part, d);
    for (int32_t i = 0; i < wholes + firsts; ++i) add(i, i, 0, {});
    for (int32_t i = 0; i < seconds; ++i) add(wholes + i, wholes + firsts + i, d.parts - 1, d);
  }
  // The pieces of clusters from `first` on go between their dealt items, about when others have the same columns: all of them at
  // the end would wait for w, which they read for few rows.
  void spread_out(int32_t first) {
    const int32_t turns = schedule_.dealt / most_, clusters = used_ - first;
    for (int32_t i = 0; i < clusters; ++i)
      schedule_.before[first + i] = static_cast<uint16_t>(turns * (2 * i + 1) / (2 * clusters));
  }
  // Half items for all clusters in turn, the last ones divided.
  void share(int32_t first, int32_t items) {
    for (; items > most_; items -= most_, first += most_) deal(first, most_, {});
    deal(first, items, division(items, most_ - items, args_.steps, 2));
  }
  // The pieces by cluster, each cluster's in the order in which they were added.
  void collect() {
    for (int32_t i = 0; i < count_; ++i) ++schedule_.piece_begin[entries_[i].cluster + 1];
    for (int32_t cluster = 0; cluster < most_; ++cluster) schedule_.piece_begin[cluster + 1] += schedule_.piece_begin[cluster];
    uint16_t next[kFusedClusters];
    std::copy_n(schedule_.piece_begin, most_, next);
    for (int32_t i = 0; i < count_; ++i) schedule_.pieces[next[entries_[i].cluster]++] = entries_[i].piece;
  }

  FusedArgs& args_;
  FusedSchedule& schedule_;
  const int32_t most_;
  int32_t used_ = 0;  // clusters
  int32_t count_ = 0;
  Entry entries_[kFusedPieces];
};

}  // namespace

bool fused_strips(int64_t rows, FusedArgs& args) {
  constexpr int64_t kPairRows = kFusedPair * kFusedRows;
  FusedTable& table = args.table;
  const int64_t pairs = rows / kPairRows, rest = rows % kPairRows;
  if (pairs + (rest > 0) > kFusedPairs) return false;
  table.pairs = table.strips = static_cast<int32_t>(pairs);
  if (rest == 0) return true;
  const bool many_columns = args.column_tiles > 2 * (kFusedPieces - 3 * kFusedClusters);  // more pieces than the schedule holds
  if (rest > kFusedRows + kFusedBox || many_columns) {
    table.pairs = ++table.strips;
    return true;
  }
  if (rest > kFusedBox) ++table.strips;
  if (rest <= kFusedBox || rest > kFusedRows) table.half = table.strips++;
  return true;
}

int32_t fused_schedule(FusedArgs& args, int32_t most) { return Scheduler(args, most).run(); }

}  // namespace loquetier::cuda
