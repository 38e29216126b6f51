// Time in a plan: how long the step may take, what fits into it, and training in pieces (PlannerConfig::slice_rows).
//
// A step with rows of requests may take until the first of its decodes owes its next token. A request's tokens are due on a
// schedule from its first token on: a step that took longer than predicted is made up for by the next ones, and time that a step
// could not use (the tile of rows that would have fitted is the next one, a micro-batch ended) is the next one's. Training fills
// what decodes and prompts leave. Without rows of requests nothing limits a step: the engine stops it between two slices when one
// arrives.
//
// A chunk of training is cut where its rows cost least, which is where the tiles of the products are full. When such a chunk takes
// longer than the schedule has, a step of decodes alone saves the time for it.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "plan/planner_state.h"
#include "plan/slices.h"

namespace loquetier {

namespace {

constexpr double kMargin = 0.95;        // of the time per token: the rest is for what the model does not foresee
constexpr double kGap = 0.98;           // of it, from one token of a request to the next behind the first two
constexpr double kAhead = 2;            // of it: time that tokens may be ahead of their schedule; what is beyond is not made use of
constexpr double kLongest = 1.25;       // of it: the longest gap that is planned, when steps before were shorter
constexpr double kAlike = 1.02;         // chunks whose row costs so many times the cheapest one's are as good: the longest is taken
constexpr double kCatchUp = 0.5;        // a step that makes up for late ones still has this share of it
constexpr double kPromptShare = 0.25;   // of the time to first token: the longest step of prompts alone
constexpr double kUrgentShare = 0.5;    // of it: with less left a prompt goes before its turn
constexpr int kUrgentLooks = 64;        // prompts a step looks at in order of deadline, bounds the work when thousands wait
constexpr int32_t kSmallestChunk = 16;  // training rows worth a place in a step
constexpr int kCalm = 16;               // of the last 32 steps: those with an arrival, at most, when a chunk may leave its pass

double causal_pairs(double begin, double rows) { return rows * begin + rows * (rows + 1) / 2; }
double passes(double heads) { return std::ceil(heads / kHeadSlice); }

}  // namespace

// ---------------------------------------------------------------- how long the step may take

void Planner::State::set_time(const StepBudget& budget) {
  now = budget.now;
  work_rest = {};
  work_rows = sample_heads = loss_heads = train_heads = 0;
  prompt_time_over = prompt_overdue = must_train = waits = false;
  train_seconds = chunk_seconds = prompt_seconds = alone_seconds = budget.max_seconds;
  if (!config.goal || budget.max_seconds >= 0) return;
  const double tpot = config.goal->tpot;
  train_seconds = chunk_seconds = kMargin * tpot;
  prompt_seconds = std::max(kMargin * tpot, kPromptShare * config.goal->ttft);
  if (decodes.empty()) return;
  double due = std::numeric_limits<double>::infinity(), longest = due;
  for (const PlannedRequest* r : decodes) {
    due = std::min(due, std::max(r->due, r->last_token + kCatchUp * tpot));
    longest = std::min(longest, r->last_token + kLongest * tpot);
  }
  chunk_seconds = std::clamp(longest - now, kCatchUp / 2 * tpot, kLongest * tpot);
  train_seconds = prompt_seconds = std::clamp(due - now, kCatchUp / 2 * tpot, chunk_seconds);
}

// What is planned, with training rows more in the same pass.
StepWork Planner::State::work_with(double rows, double pairs, double heads, double with_gradient) const {
  StepWork work = work_rest;
  work.add_forward(work_rows + rows);
  work.train_pairs += pairs;
  work.head_rows += sample_heads + loss_heads + heads;
  work.train_head_rows += train_heads + with_gradient;
  work.head_passes += passes(sample_heads) + passes(loss_heads + heads - with_gradient) + passes(with_gradient);
  work.adapter_bytes = static_cast<double>(limits.bytes_claimed);
  return work;
}

// ---------------------------------------------------------------- prompts

int64_t Planner::State::prompt_rows_in_time(const PlannedRequest& r, int64_t most) {
  if (!config.cost || prompt_seconds < 0) return most;
  const double begin = static_cast<double>(r.computed + r.planned);
  const int64_t rows = config.cost->fits(prompt_seconds, most, [&](int64_t n) {
    StepWork work = work_with(static_cast<double>(n), 0, 1, 0);
    work.prefill_pairs += causal_pairs(begin, static_cast<double>(n));
    return work;
  });
  if (rows < most) prompt_time_over = true;
  // One that was passed over too long, or the first of a step without decodes, goes on in any case.
  const bool minimum = prompt_overdue || work_rows == 0;
  return minimum ? std::min<int64_t>(most, std::max<int64_t>(rows, config.page_size)) : rows;
}

void Planner::State::count_prompt_rows(const PlannedRequest& r, int64_t begin, int64_t rows) {
  work_rows += static_cast<double>(rows);
  work_rest.prefill_pairs += causal_pairs(static_cast<double>(begin), static_cast<double>(rows));
  if (rows == r.remaining()) sample_heads += 1;
}

double Planner::State::prefill_seconds(double begin, double rows) const {
  if (!config.cost) return 0;
  StepWork work;
  work.add_forward(rows);
  work.prefill_pairs = causal_pairs(begin, rows);
  work.head_rows = work.head_passes = 1;
  return config.cost->predict(work);
}

// Prompts of one priority whose deadline is near, the earliest first. Their rows count against their adapter's turns.
void Planner::State::serve_urgent(PromptLevel& level) {
  if (urgent.empty()) return;
  const double near = config.goal ? kUrgentShare * config.goal->ttft : std::numeric_limits<double>::infinity();
  PlannedRequest first;
  first.priority = level.priority;
  first.deadline = -1;
  int looks = kUrgentLooks;
  for (auto it = urgent.lower_bound(&first); it != urgent.end() && (*it)->priority == level.priority && looks > 0; --looks) {
    PlannedRequest& r = **it;
    if (r.deadline < now) {  // missed: it has its turn with the others
      it = urgent.erase(it);
      continue;
    }
    if (limits.rows_left == 0 || prompt_time_over) return;
    if (r.deadline - now - prefill_seconds(r.computed, r.length() - r.computed) > near) return;
    ++it;
    // Credit first: an adapter that floods always has prompts whose deadline is the next.
    PromptQueue& queue = prompts.queue_of(r);
    if ((queue.serial == serial ? queue.plan_deficit : queue.deficit) < 0 && level.ring.size() > 1) continue;
    if (r.planned == 0 && r.state != RequestState::decoding) serve_queue(queue, limits.rows_left, false);
  }
}

std::vector<int64_t> Planner::State::late(double when) const {
  std::vector<int64_t> ids;
  if (rejectable.empty()) return ids;
  const double longest = prefill_seconds(0, static_cast<double>(pages.total() * config.page_size));
  for (const auto& [deadline, id] : rejectable) {  // the earliest first
    if (deadline > when + longest) break;
    const PlannedRequest& r = requests.at(id);
    if (deadline < when + prefill_seconds(r.computed, r.length() - r.computed)) ids.push_back(id);
  }
  return ids;
}

void Planner::State::note_token(PlannedRequest& r, double when) {
  const double tpot = config.goal ? config.goal->tpot : 0;
  r.last_token = when;
  r.due = r.first_token < 0 ? when + kMargin * tpot : std::min(r.due, when + kAhead * tpot) + kGap * tpot;
  if (r.first_token >= 0) return;
  r.first_token = when;
  if (r.deadline < 0) return;
  ++(when <= r.deadline ? counts.deadlines_met : counts.deadlines_missed);
  urgent.erase(&r);
  rejectable.erase({r.deadline, r.id});
}

// ---------------------------------------------------------------- training in pieces

bool Planner::State::interruptible(const Plan& plan) const { return is_alone(plan) || (!overdue_training && !cut_short); }

bool Planner::State::chunk_leaves(const Plan& plan) const {
  const bool calm = std::popcount(arrived) <= kCalm;
  return interruptible(plan) && (is_alone(plan) || calm);
}

void Planner::State::train_in_pieces() {
  plan_pieces();
  if (training.composed() && !training.has_chunk()) training.drop_composition();  // none of it fits this step
}

// A chunk has room for slack_rows other rows beside it. When training must go on, the others leave it that: how many rows they do
// not get.
int64_t Planner::State::rows_held() const {
  const bool chunk = training.composed() || training.waits_for_chunk();
  return must_train && chunk ? std::max<int64_t>(0, limits.rows_left - config.slack_rows) : 0;
}

void Planner::State::plan_pieces() {
  const bool serves = work_rows > 0;
  if (limits.rows_left > 0 && !(skip_evaluation && training.could_train())) evaluate();
  const MicroRows::Piece evaluated = training.evaluation();  // an overdue one may have come before
  work_rows += evaluated.rows;
  work_rest.train_pairs += evaluated.pairs;
  loss_heads += evaluated.heads;
  const bool alone = work_rows == 0;
  // When requests wait until running ones end, and these end the sooner the shorter the steps, training yields: all it has is the
  // smallest piece when it is overdue.
  const bool yields = serves && lacks_place && config.goal;
  if (yields && !must_train) return;
  const double limit = !serves ? alone_seconds : yields ? 0 : train_seconds;
  if (training.may_train()) {
    if (limits.rows_left <= 0 || work_rows > config.slack_rows) return;
    training.compose(limits, composition_rows(), false);
    if (!training.composed()) return;
  } else if (!training.claim_micro(limits)) {
    return;
  }
  const bool forwarded = training.backward_slices_left() > 0;
  if (forwarded || plan_forward(alone, limit, yields ? 0 : chunk_seconds)) plan_backward(limit, !forwarded);
}

// Whole examples, as many as fit.
void Planner::State::evaluate() {
  if (!training.evaluates()) return;
  const int64_t rows_before = limits.rows_left, hard_before = limits.hard_rows_left;
  int64_t most = limits.rows_left;
  if (config.cost && train_seconds >= 0 && work_rows > 0) {
    most = config.cost->fits(train_seconds, most, [&](int64_t n) {
      const double rows = static_cast<double>(n);
      return work_with(rows, causal_pairs(0, rows), rows, 0);
    });
  } else if (work_rows == 0) {
    most = std::min<int64_t>(most, config.slice_rows);
  }
  limits.rows_left = most;
  training.serve_evaluation(limits);
  const int64_t taken = most - limits.rows_left;
  limits.rows_left = rows_before - taken;
  limits.hard_rows_left = hard_before - taken;
  // Alone, one that is longer than a piece need not wait until it is overdue.
  if (taken == 0 && work_rows == 0 && training.evaluates()) training.serve_oldest_evaluation(limits);
}

// How many of `most` slices fit on top of what is planned; at least one when training must go on.
int32_t Planner::State::slices_in_time(int32_t most, double limit, const std::function<StepWork(int32_t)>& slice) {
  if (!config.cost || limit < 0) return most;
  StepWork work = work_with(0, 0, 0, 0);
  double seconds = config.cost->predict(work);
  int32_t n = 0;
  for (; n < most; ++n) {
    const StepWork next = slice(n);
    seconds += config.cost->marginal(work, next);
    if (seconds > limit && !(n == 0 && must_train)) break;
    work.steps |= next.steps;
    work_rest += next;
  }
  if (n > 0) must_train = false;
  return n;
}

// How many of `most` rows a chunk beside other rows has; 0: none in this step. longest: what the step may take when time was saved
// for it.
int64_t Planner::State::chunk_in_time(int64_t most, double limit, double longest) {
  const MicroRows& micro = training.micro_rows();
  const int32_t begin = training.forward_begin();
  const auto with = [&](int64_t n) {
    const MicroRows::Piece piece = micro.piece(begin, static_cast<int32_t>(n));
    return work_with(static_cast<double>(n), piece.pairs, piece.heads, piece.heads);
  };
  const double without = config.cost->predict(work_with(0, 0, 0, 0));
  const double gap = config.goal ? kGap * config.goal->tpot : limit;
  const int64_t smallest = std::min<int64_t>(kSmallestChunk, most);
  struct Size {
    int64_t rows = 0;
    double seconds = 0, cost = 0;  // cost: of a row, with the steps of decodes alone that save the time
  };
  std::vector<Size> sizes;
  const auto add = [&](int64_t rows, double within) {  // false: neither this nor any more rows
    if (rows < smallest) return true;
    if (rows > most) return false;
    const double seconds = config.cost->predict(with(rows));
    if (seconds > within) return false;
    const double over = std::max(0.0, seconds - gap), saving = over > 0 ? over * without / std::max(1e-9, gap - without) : 0;
    sizes.push_back({rows, seconds, (seconds + saving) / static_cast<double>(rows)});
    return true;
  };
  constexpr int64_t kTile = StepWork::kPassRows;
  add(config.cost->fits(limit, most, with), limit);
  for (int64_t rows = kTile - static_cast<int64_t>(work_rows) % kTile; add(rows, longest); rows += kTile) continue;
  add(most, longest);
  const auto best = [&](double within) {
    double cheapest = std::numeric_limits<double>::infinity();
    for (const Size& s : sizes) cheapest = s.seconds <= within ? std::min(cheapest, s.cost) : cheapest;
    Size found;
    for (const Size& s : sizes) {
      if (s.seconds <= within && s.rows > found.rows && s.cost <= kAlike * cheapest) found = s;
    }
    return found;
  };
  const Size wanted = best(longest);
  if (wanted.seconds <= limit && wanted.rows > 0) return wanted.rows;
  if (wanted.rows > 0 && !must_train && !waited && limit + gap - without >= wanted.seconds) {
    waits = true;
    return 0;
  }
  const Size found = best(limit);
  return found.rows > 0 ? found.rows : must_train ? smallest : 0;
}

bool Planner::State::plan_forward(bool alone, double limit, double longest) {
  const MicroRows& micro = training.micro_rows();
  const int32_t begin = training.forward_begin(), layers = config.num_layers;
  const auto slice_of = [&](int32_t rows, int32_t index) {
    const MicroRows::Piece piece = micro.piece(begin, rows);
    StepWork work;
    work.slices = 1;
    if (index < layers) {
      work.add_forward(rows, 1.0 / layers);
      work.train_pairs = piece.pairs / layers;
    } else {
      work.steps = true;
      work.head_rows = work.train_head_rows = std::clamp(piece.heads - (index - layers) * kHeadSlice, 0, kHeadSlice);
      work.head_passes = work.head_rows > 0;
    }
    return work;
  };
  // An upper bound: which rows have a loss is known only to the engine.
  const auto all_slices = [&](int32_t rows) { return layers + rows / kHeadSlice + 2; };

  if (const int32_t rows = training.stopped_chunk(); rows > 0) {
    const int32_t all = all_slices(rows), left = training.stopped_slices_left(all);
    const int32_t n = slices_in_time(left, limit, [&](int32_t i) { return slice_of(rows, all - left + i); });
    training.take_forward_slices(n);
    return n == left && begin + rows == micro.rows;
  }
  if (work_rows > config.slack_rows) return false;
  const auto most = static_cast<int32_t>(std::min<int64_t>(micro.rows - begin, limits.rows_left));
  if (most <= 0) return false;
  if (alone) {
    const int32_t rows = std::min(most, config.slice_rows);
    const int32_t all = all_slices(rows);
    const int32_t n = slices_in_time(all, limit, [&](int32_t i) { return slice_of(rows, i); });
    if (n == 0) return false;
    training.take_chunk(rows);
    limits.take_rows(rows);
    training.take_forward_slices(n);
    return n == all && begin + rows == micro.rows;
  }
  int64_t rows = most;
  if (config.cost && limit >= 0) {
    rows = chunk_in_time(most, limit, longest);
    if (rows == 0) return false;
    must_train = false;
  }
  training.take_chunk(static_cast<int32_t>(rows));
  limits.take_rows(rows);
  const MicroRows::Piece piece = micro.piece(begin, static_cast<int32_t>(rows));
  work_rows += static_cast<double>(rows);
  work_rest.train_pairs += piece.pairs;
  loss_heads += piece.heads;
  train_heads += piece.heads;
  return begin + rows == micro.rows;
}

void Planner::State::plan_backward(double limit, bool forward_planned) {
  const MicroRows& micro = training.micro_rows();
  const int32_t all = micro.slices(config.num_layers), left = forward_planned ? all : training.backward_slices_left();
  const int32_t most = std::min(left, training.max_slices());
  const int32_t n =
      slices_in_time(most, limit, [&](int32_t i) { return micro.slice_work(all - left + i, config.num_layers, config.mlp_share); });
  training.take_backward_slices(n);
}

// ---------------------------------------------------------------- what a plan costs

StepWork Planner::State::work_of(const Plan& plan, const StepOutcome& outcome) const {
  StepWork work;
  const MicroRows& micro = training.micro_rows();
  const int32_t layers = config.num_layers, begin = training.forward_begin();
  double samples = 0, losses = 0, gradients = 0;
  const int32_t forward_ran = outcome.forward_slices < 0 ? plan.forward_slices : outcome.forward_slices;
  const bool cut = plan.forward_slices > 0;  // a chunk in slices
  const bool left_pass = !cut && !outcome.forward_done && plan.rows[static_cast<size_t>(Kind::train)] > 0;
  const bool forward_done = outcome.forward_done;
  const int32_t from = plan.resumes ? training.stopped_slices() : 0;
  const double share = static_cast<double>(std::min(layers, from + forward_ran) - std::min(layers, from)) / layers;

  double rows = 0;
  for (const Segment& s : plan.segments) {
    if (s.kind == Kind::train) continue;
    rows += s.rows;
    const double pairs = causal_pairs(s.position, s.rows);
    if (s.kind == Kind::decode) {
      work.decode_rows += 1;
      work.decode_context += s.position + 1;
    } else if (s.kind == Kind::prefill) {
      work.prefill_pairs += pairs;
    } else {
      work.train_pairs += pairs;
      losses += training.job(s.id).targets[static_cast<size_t>(s.example)];
    }
    samples += s.samples;
  }
  const int32_t chunk = plan.rows[static_cast<size_t>(Kind::train)];
  const int32_t stepped = plan.resumes ? training.stopped_chunk() : chunk;
  if (stepped > 0) {
    const MicroRows::Piece piece = micro.piece(begin, stepped);
    if (left_pass) {
      work.add_forward(rows + stepped, share);
      work.train_pairs += piece.pairs * share;
    } else if (!cut) {
      rows += stepped;
      work.train_pairs += piece.pairs;
    } else {
      work.add_forward(stepped, share);
      work.train_pairs += piece.pairs * share;
      work.slices += forward_ran;
    }
    // Of a chunk in slices: the head chunks that its slices behind the layers were.
    const auto heads_by = [&](int32_t slice) { return std::clamp((slice - layers) * kHeadSlice, 0, piece.heads); };
    const bool all = (!cut && !left_pass) || (forward_done && outcome.forward_slices >= 0);
    gradients += (all ? piece.heads : heads_by(from + forward_ran)) - (cut ? heads_by(from) : 0);
  }
  work.add_forward(rows, left_pass ? 1 - share : 1);
  work.head_rows = samples + losses + gradients;
  work.train_head_rows = gradients;
  work.head_passes = passes(samples) + passes(losses) + passes(gradients);

  int32_t backward_ran = outcome.backward_slices < 0 ? plan.backward_slices : outcome.backward_slices;
  if (!forward_done) backward_ran = 0;
  if (backward_ran > 0) {
    const int32_t all = micro.slices(layers), left = training.backward_slices_left();
    const int32_t done = left > 0 ? all - left : 0;
    for (int32_t i = 0; i < backward_ran; ++i) work += micro.slice_work(done + i, layers, config.mlp_share);
    if (done + backward_ran == all) {
      for (const int64_t id : plan.completed_jobs) {
        const PlannedJob& job = training.job(id);
        if (job.train && job.barrier) work.update_bytes += static_cast<double>(job.queue->adapter->bytes);
      }
    }
  }
  for (const AdapterUse& use : plan.adapters) work.adapter_bytes += static_cast<double>(adapters.bytes(use.adapter));
  return work;
}

}  // namespace loquetier
