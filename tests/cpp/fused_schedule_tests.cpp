// The schedule of the fused product (cuda/fused_schedule.h) for many numbers of rows, columns, steps and clusters: every step of
// every item is computed once, lent sums have a place of their own and are added by the item's last part, and the longest cluster
// has no more steps than without divisions.
#include "fused_schedule.h"

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "check.h"

using namespace loquetier::cuda;

namespace {

struct Case {
  int64_t rows;
  int column_tiles, steps, clusters;
};

void check_schedule(FusedArgs& args, const Case& c) {
  args.table = {};
  args.schedule = {};
  args.column_tiles = args.part_tile[1] = c.column_tiles;
  args.steps = c.steps;
  CHECK(fused_strips(c.rows, args));
  const FusedSchedule& schedule = args.schedule;
  const int used = fused_schedule(args, c.clusters), items = fused_items(args);
  CHECK(used >= 1 && used <= c.clusters && schedule.dealt % used == 0 && schedule.dealt <= items);

  std::vector<std::vector<int>> times(static_cast<size_t>(items), std::vector<int>(static_cast<size_t>(c.steps), 0));
  for (int item = 0; item < schedule.dealt; ++item) times[static_cast<size_t>(item)].assign(static_cast<size_t>(c.steps), 1);
  std::map<int, int> lenders, adders;  // place -> cluster
  int longest = 0;                     // in tenths of a pair's steps, of which a half item's take six
  for (int cluster = 0; cluster < used; ++cluster) {
    int length = schedule.dealt / used * c.steps * 10;
    for (int i = schedule.piece_begin[cluster]; i < schedule.piece_begin[cluster + 1]; ++i) {
      const FusedPiece& piece = schedule.pieces[i];
      const int item = schedule.dealt + piece.item, place = (piece.item - schedule.divided) * (schedule.parts - 1);
      const bool whole = piece.begin == 0 && piece.end == c.steps;  // others come last: they lend or wait
      CHECK(schedule.before[cluster] <= schedule.dealt / used && (whole || schedule.before[cluster] == schedule.dealt / used));
      CHECK(item < items && piece.begin < piece.end && piece.end <= c.steps && (piece.part == 0) == (piece.begin == 0));
      for (int step = piece.begin; step < piece.end; ++step) ++times[static_cast<size_t>(item)][static_cast<size_t>(step)];
      if (piece.end < c.steps) {
        CHECK(place + piece.part >= 0 && place + piece.part < c.clusters);
        CHECK(lenders.emplace(place + piece.part, cluster).second);
      } else {
        for (int part = 0; part < piece.part; ++part) CHECK(adders.emplace(place + part, cluster).second);
      }
      length += (piece.end - piece.begin) * (fused_work(args, item, 0).half ? 6 : 10);
    }
    longest = std::max(longest, length);
  }
  CHECK(schedule.piece_begin[used] <= kFusedPieces);
  for (const auto& steps : times) CHECK(std::all_of(steps.begin(), steps.end(), [](int n) { return n == 1; }));
  CHECK_EQ(lenders.size(), adders.size());
  for (const auto& [place, cluster] : adders) CHECK(lenders.count(place) == 1 && lenders[place] < cluster);

  const int halves = args.table.half >= 0 ? (c.column_tiles + 1) / 2 : 0, wholes = items - halves;
  const int turns = (wholes + c.clusters - 1) / c.clusters, room = turns * c.clusters - wholes;
  const int behind = std::max(0, (halves - 2 * room + c.clusters - 1) / c.clusters);
  CHECK(longest <= (10 * turns + (halves > 0 ? 2 : 0) + 6 * behind) * c.steps);
}

}  // namespace

TEST(every_step_once) {
  const auto args = std::make_unique<FusedArgs>();
  for (const int64_t rows : {1, 64, 65, 128, 129, 192, 193, 256, 513, 700, 768, 1088, 1216, 1280, 2112, 4385, 8192, 32768})
    for (const int column_tiles : {1, 2, 3, 16, 24, 112, 512, 513})
      for (const int steps : {1, 7, 64, 448})
        for (const int clusters : {1, 2, 60, 66, 128}) check_schedule(*args, {rows, column_tiles, steps, clusters});
  CHECK(!fused_strips(32769, *args));
}

// Items lie in bands along the longer side, and left-over strips have two tiles an item.
TEST(every_tile_once) {
  const auto args = std::make_unique<FusedArgs>();
  for (const int64_t rows : {1, 129, 192, 256, 513, 1216, 2112, 4385, 8192, 32768}) {
    for (const int column_tiles : {1, 2, 3, 7, 8, 9, 16, 24, 31, 32, 33, 112, 512}) {
      args->table = {};
      args->column_tiles = args->part_tile[1] = column_tiles;
      CHECK(fused_strips(rows, *args));
      std::vector<int> times(static_cast<size_t>(args->table.strips * column_tiles), 0);
      for (int item = 0; item < fused_items(*args); ++item) {
        const FusedWork upper = fused_work(*args, item, 0), lower = fused_work(*args, item, 1);
        CHECK(upper.strip == lower.strip && lower.row == upper.row + (upper.wide ? 0 : kFusedRows));
        ++times[static_cast<size_t>(upper.strip * column_tiles + upper.column)];
        if (upper.wide && lower.column < column_tiles) ++times[static_cast<size_t>(lower.strip * column_tiles + lower.column)];
      }
      CHECK(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }));
    }
  }
}

// Rows by which a batch of training with decodes exceeds whole pairs of tiles: 2,112 rows of 4,096 columns fill the 66 clusters of
// an H200 twice, as 2,048 rows nearly do.
TEST(left_over_rows_fill_the_last_turn) {
  const auto args = std::make_unique<FusedArgs>();
  args->column_tiles = args->part_tile[1] = 16;
  args->steps = 64;
  CHECK(fused_strips(2112, *args));
  CHECK_EQ(args->table.pairs, 8);
  CHECK_EQ(args->table.half, 8);
  CHECK_EQ(fused_items(*args), 8 * 16 + 8);
  CHECK_EQ(fused_schedule(*args, 66), 66);
  for (int cluster = 0; cluster < 66; ++cluster) {
    int halves = 0;
    for (int i = args->schedule.piece_begin[cluster]; i < args->schedule.piece_begin[cluster + 1]; ++i)
      halves += fused_work(*args, args->schedule.dealt + args->schedule.pieces[i].item, 0).half ? 1 : 2;
    CHECK_EQ(halves, 2);
  }
}

// Where the left-over rows read much of w for little work, their items are spread over the whole time: 56 of 28,672 columns.
TEST(left_over_rows_are_spread_out) {
  const auto args = std::make_unique<FusedArgs>();
  args->column_tiles = args->part_tile[1] = 112;
  args->steps = 64;
  CHECK(fused_strips(2112, *args));
  CHECK_EQ(fused_schedule(*args, 66), 66);
  int early[13] = {};  // clusters by dealt items in front of their half items
  for (int cluster = 38; cluster < 66; ++cluster) ++early[args->schedule.before[cluster]];
  for (const int clusters : early) CHECK(clusters == 2 || clusters == 3);
}
