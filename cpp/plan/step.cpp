// One plan, phase by phase: what was passed over too long, decodes, prompts, backward, training and evaluation.
//
// Every phase takes rows, pages and pool bytes from what the phases before it left. A thing is claimed only when all it needs is
// there, so a request that waits for pages never holds room in the pool that another could use.
#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "core/check.h"
#include "plan/planner_state.h"

namespace loquetier {

namespace {

constexpr int kMisses =
    64;  // queues of a priority that may get nothing before a step looks no further: bounds the work when thousands wait

}  // namespace

Plan Planner::State::plan(const StepBudget& budget) {
  open = true;
  limits = {};
  limits.serial = ++serial;
  limits.hard_rows_left = config.max_batch_tokens;
  limits.train_rows_left = config.max_train_tokens < 0 ? config.max_batch_tokens : config.max_train_tokens;
  limits.rows_left = budget.max_rows < 0 ? config.max_batch_tokens : std::min(budget.max_rows, config.max_batch_tokens);
  limits.rows_wanted = limits.rows_left;
  limits.bytes_left = config.adapter_pool_bytes;
  slices_offered = budget.max_backward_slices != 0;
  training.begin(serial, budget.max_backward_slices);
  survey();
  set_time(budget);
  serve_overdue();
  overdue_training = must_train;
  const int64_t held = rows_held();
  limits.rows_left -= held;
  if (limits.rows_left > 0) {
    serve_decodes();
    serve_prompts();
    unblock_prompt();
  }
  limits.rows_left += held;
  if (config.slice_rows == 0) {
    training.run_backward(limits);
    training.serve(limits);
  } else {
    train_in_pieces();
  }
  missed_queue = nullptr;
  if (!prompts.empty() && static_cast<int64_t>(running.size()) < config.max_sequences) {
    PromptQueue& next = next_level().ring.front();
    if (next.serial != serial || !next.served) missed_queue = &next;
  }
  return emit();
}

// ---------------------------------------------------------------- what there is

void Planner::State::survey() {
  decodes.clear();
  admitted.clear();
  served_queues.clear();
  preempted.clear();
  decode_pages = prompt_pages = 0;
  door_closed = lacks_place = false;
  int64_t wanted_bytes = 0;
  for (PlannedRequest* r : running) {
    r->pages_before = r->pages.size();
    r->page_due = false;
    if (r->state == RequestState::prefilling) {
      prompt_pages += missing_prompt_pages(*r);
    } else if (r->remaining() > 0) {
      decodes.push_back(r);
      r->page_due = r->computed == static_cast<int64_t>(r->pages.size()) * config.page_size;
      decode_pages += r->page_due;
      AdapterVersion& version = r->version();
      if (version.wanted != serial) wanted_bytes += version.bytes;
      version.wanted = serial;
    }
  }
  wants_more_bytes = wanted_bytes > config.adapter_pool_bytes;
}

// ---------------------------------------------------------------- before all else: of each sort, the one that waited longest, when
// that was too long

void Planner::State::serve_overdue() {
  PlannedRequest* decode = nullptr;
  for (PlannedRequest* r : decodes) {
    if (!decode || r->last_served < decode->last_served) decode = r;
  }
  const PromptQueue* prompt = prompts.empty() ? nullptr : &next_level().ring.front();
  enum Sort { decoding, prompting, micro_batch, example };
  std::array<std::pair<int64_t, Sort>, 4> ages = {{
      {decode ? static_cast<int64_t>(clock - decode->last_served) : -1, decoding},
      {prompt ? prompt->passed : -1, prompting},
      {training.micro_age(), micro_batch},
      {training.example_age(), example},
  }};
  std::ranges::sort(ages,
                    [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  for (const auto& [age, sort] : ages) {
    if (age < config.starvation_steps) break;
    if (sort == micro_batch) {
      if (config.slice_rows == 0) training.run_backward(limits);
      else must_train |= training.claim_micro(limits);
    }
    if (limits.rows_wanted == 0) continue;
    if (sort == decoding) serve_decode(*decode);
    if (sort == prompting) serve_overdue_prompt();
    if (sort != example) continue;
    if (config.slice_rows > 0 && training.oldest_trains()) {
      training.compose(limits, composition_rows(), true);
      must_train |= training.composed();
      continue;
    }
    const int64_t rows = training.oldest_rows(), before = limits.rows_left;
    if (rows > limits.rows_wanted) {  // longer than any step's budget: this step is longer, and decodes ride along
      const int64_t with_decodes = rows + static_cast<int64_t>(decodes.size());
      limits.rows_left = std::max(limits.rows_left, std::min(limits.hard_rows_left, with_decodes));
    }
    if (!training.serve_oldest(limits)) limits.rows_left = before;
  }
}

// ---------------------------------------------------------------- decodes

void Planner::State::serve_decodes() {
  const auto ready = std::ranges::count_if(decodes, [](const PlannedRequest* r) { return r->planned == 0; });
  if (ready > limits.rows_left || wants_more_bytes || !limits.claimed.empty()) {
    std::ranges::sort(decodes, [](const PlannedRequest* a, const PlannedRequest* b) {
      return a->turn != b->turn ? a->turn < b->turn : StandsHigher{}(a, b);
    });
  } else if (decode_pages > cache.available()) {
    std::ranges::sort(decodes, StandsHigher{});
  }
  for (PlannedRequest* r : decodes) {
    if (limits.rows_left == 0) break;
    if (r->state == RequestState::decoding && r->planned == 0) serve_decode(*r);
  }
}

bool Planner::State::serve_decode(PlannedRequest& r) {
  if (limits.rows_left == 0 || !limits.fits(r.version())) return false;
  if (r.page_due) {
    if (!make_page(r)) return false;
    r.pages.push_back(cache.allocate());
    r.new_pages = true;
    r.page_due = false;
    --decode_pages;
  }
  limits.claim(r.version());
  limits.take_rows(1);
  r.planned = 1;
  work_rows += 1;
  sample_heads += 1;
  work_rest.decode_rows += 1;
  work_rest.decode_context += static_cast<double>(r.computed + 1);
  return true;
}

bool Planner::State::make_page(PlannedRequest& request) {
  while (cache.available() == 0) {
    PlannedRequest* lowest = *by_standing.rbegin();
    if (!StandsHigher{}(&request, lowest)) return false;
    preempt(*lowest);
  }
  return true;
}

void Planner::State::preempt(PlannedRequest& r) {
  limits.take_rows(-r.planned);
  work_rows -= static_cast<double>(r.planned);
  r.planned = 0;
  if (r.page_due) --decode_pages;
  r.page_due = false;
  if (r.state == RequestState::prefilling) prompt_pages -= missing_prompt_pages(r);
  if (r.admitted_now) std::erase(admitted, &r);
  else {
    preempted.push_back(r.id);
    ++counts.preemptions;
  }
  r.admitted_now = false;
  leave_running(r);
  release_pages(r, 0);
  r.computed = 0;
  prompts.preempt(r);
  r.state = RequestState::waiting;
}

// ---------------------------------------------------------------- prompts

void Planner::State::touch(PromptQueue& queue) {
  if (queue.serial == serial) return;
  queue.serial = serial;
  queue.plan_deficit = queue.deficit;
  queue.served = false;
}

// Goes before the decodes, so it leaves them their rows and pages where it can.
bool Planner::State::serve_overdue_prompt() {
  const int64_t spare = limits.rows_left - static_cast<int64_t>(decodes.size());
  const int64_t rows = std::min(prompt_quantum(), std::max<int64_t>(spare, config.page_size));
  prompt_overdue = true;
  const bool served = serve_queue(next_level().ring.front(), rows, level_aged()) == Serve::served;
  prompt_overdue = prompt_time_over = false;
  return served;
}

void Planner::State::serve_prompts() {
  if (level_aged() && limits.rows_left > 0) serve_level(prompts.least_recently_served(), prompt_quantum(), true);
  for (auto& [priority, level] : prompts.levels()) {
    if (limits.rows_left == 0 || prompt_time_over) break;
    serve_urgent(level);
    serve_level(level, limits.rows_left, false);
  }
}

// The adapters of one priority by deficit round-robin, at most max_rows in all.
void Planner::State::serve_level(PromptLevel& level, int64_t max_rows, bool aged) {
  const int64_t rows_before = limits.rows_left;
  const auto rows_left = [&] { return std::min(limits.rows_left, max_rows - (rows_before - limits.rows_left)); };
  const auto turn = [&](PromptQueue& queue) {  // true: it could use another
    touch(queue);
    queue.plan_deficit += prompt_quantum();
    Serve result = Serve::served;
    while (result == Serve::served && queue.plan_deficit > 0 && rows_left() > 0) {
      result = serve_queue(queue, std::min(queue.plan_deficit, rows_left()), aged);
    }
    queue.plan_deficit = std::min(queue.plan_deficit, prompt_quantum());
    return result == Serve::served;
  };
  std::vector<PromptQueue*> again;
  int misses = 0;
  for (PromptQueue& queue : level.ring) {
    if (rows_left() <= 0 || misses == kMisses) break;
    if (turn(queue)) again.push_back(&queue);
    else misses += queue.served ? 0 : 1;
  }
  if (misses == kMisses) {  // those that have a place in the pool are served though far behind
    for (size_t i = 0; i < limits.claimed.size() && rows_left() > 0; ++i) {
      PromptQueue* queue = prompts.find(*limits.claimed[i]->adapter, level);
      if (queue && queue->serial != serial && turn(*queue)) again.push_back(queue);
    }
  }
  while (!again.empty() && rows_left() > 0) {
    std::erase_if(again, [&](PromptQueue* queue) { return rows_left() > 0 && !turn(*queue); });
  }
}

Planner::State::Serve Planner::State::serve_queue(PromptQueue& queue, int64_t max_rows, bool aged) {
  touch(queue);
  if (limits.rows_left == 0 || prompt_time_over) return Serve::no_room;
  PlannedRequest* r = nullptr;
  for (auto it = queue.prefilling.rbegin(); it != queue.prefilling.rend() && (*it)->remaining() > 0; ++it) r = *it;
  if (!r) {
    if (queue.waiting.empty() || door_closed) return Serve::no_room;
    r = queue.waiting.front();
    const Serve result = admit(*r, aged);
    lacks_place |= result == Serve::no_slot || result == Serve::no_pages;
    if (result == Serve::no_slot || (result == Serve::no_pages && queue.passed >= config.starvation_steps)) door_closed = true;
    if (result != Serve::served) return result;
  }
  const int64_t planned = r->planned;
  const Serve result = extend_chunk(*r, max_rows);
  if (result != Serve::served) return result;
  queue.plan_deficit -= r->planned - planned;
  if (!std::exchange(queue.served, true)) served_queues.push_back(&queue);
  return result;
}

// The chunk ends where rows, pages or the prompt end.
Planner::State::Serve Planner::State::extend_chunk(PlannedRequest& r, int64_t max_rows) {
  if (limits.rows_left == 0 || !limits.fits(r.version())) return Serve::no_room;
  const int64_t begin = r.computed + r.planned;
  const int64_t usable = static_cast<int64_t>(r.pages.size()) + std::max<int64_t>(0, cache.available() - decode_pages);
  int64_t rows = std::min({r.remaining(), max_rows, limits.rows_left, usable * config.page_size - begin});
  if (rows <= 0) return Serve::no_pages;
  rows = prompt_rows_in_time(r, rows);
  if (rows <= 0) return Serve::no_room;
  count_prompt_rows(r, begin, rows);
  limits.claim(r.version());
  limits.take_rows(rows);
  for (int64_t missing = pages_for(begin + rows) - static_cast<int64_t>(r.pages.size()); missing > 0; --missing) {
    r.pages.push_back(cache.allocate());
    r.new_pages = true;
    --prompt_pages;
  }
  r.planned += rows;
  return Serve::served;
}

// A prompt comes in when there is room for all of it beside what those inside still need to their end, and a page for each running
// request to grow.
Planner::State::Serve Planner::State::admit(PlannedRequest& r, bool aged) {
  const int64_t inside = static_cast<int64_t>(running.size());
  if (inside >= config.max_sequences) return Serve::no_slot;
  if (!limits.fits(r.version())) return Serve::no_room;
  const int64_t reserve = std::min(inside, (pages.total() + 7) / 8);
  const int64_t room = cache.available() - decode_pages - prompt_pages - reserve;
  if (room < 1) return Serve::no_pages;
  r.kv_epoch = r.pinned ? r.pinned_epoch : r.adapter->epoch;
  PrefixCache::Match match;
  if (r.use_prefix_cache && cacheable(r, r.kv_epoch)) {
    match = cache.match(r.adapter->id, r.version().version, r.tokens, (r.length() - 1) / config.page_size);
  }
  const int64_t hits = static_cast<int64_t>(match.pages.size());
  if (pages_for(r.length()) - hits > room - match.idle) return Serve::no_pages;
  for (const int32_t page : match.pages) cache.retain(page);
  r.pages = std::move(match.pages);
  r.new_pages = true;
  r.cached_pages = hits;
  r.computed = r.hit_tokens = hits * config.page_size;
  r.pages_before = 0;
  r.page_due = false;
  r.admitted_now = true;
  r.aged |= aged;
  r.state = RequestState::prefilling;
  prompt_pages += missing_prompt_pages(r);
  prompts.admit(r);
  admitted.push_back(&r);
  enter_running(r);
  return Serve::served;
}

void Planner::State::undo_admit(PlannedRequest& r) {
  leave_running(r);
  release_pages(r, 0);
  r.computed = 0;
  r.admitted_now = false;
  prompts.undo_admit(r);
  r.state = RequestState::waiting;
}

// When no request got a row and a prompt stands without pages, the highest one takes the pages of lower ones: whoever stands
// highest always proceeds.
void Planner::State::unblock_prompt() {
  if (limits.rows_left == 0) return;
  PlannedRequest* blocked = nullptr;
  for (PlannedRequest* r : by_standing) {
    if (r->planned > 0) return;
    if (!blocked && r->state == RequestState::prefilling && limits.fits(r->version())) blocked = r;
  }
  if (!blocked) return;
  while (extend_chunk(*blocked, limits.rows_left) == Serve::no_pages) {
    PlannedRequest* lowest = *by_standing.rbegin();
    if (!StandsHigher{}(blocked, lowest)) return;
    preempt(*lowest);
  }
  if (blocked->planned == 0) return;
  PromptQueue& queue = prompts.queue_of(*blocked);
  touch(queue);
  if (!std::exchange(queue.served, true)) served_queues.push_back(&queue);
}

// ---------------------------------------------------------------- the result

Plan Planner::State::emit() {
  Plan plan;
  plan.serial = serial;
  plan.segments.reserve(decodes.size() + admitted.size() + 16);
  training.emit(plan);
  for (const Kind kind : {Kind::prefill, Kind::decode}) {
    const RequestState state = kind == Kind::prefill ? RequestState::prefilling : RequestState::decoding;
    const auto first = static_cast<std::ptrdiff_t>(plan.segments.size());
    bool ordered = true;
    for (PlannedRequest* r : running) {
      if (r->planned == 0 || r->state != state) continue;
      AdapterVersion& version = r->version();
      const Segment* before = static_cast<std::ptrdiff_t>(plan.segments.size()) > first ? &plan.segments.back() : nullptr;
      ordered &= !before || before->adapter != version.adapter->id || before->version <= version.version;
      plan.segments.push_back({.kind = kind,
                               .id = r->id,
                               .example = -1,
                               .adapter = version.adapter->id,
                               .version = version.version,
                               .row_begin = plan.total_rows(),
                               .rows = static_cast<int32_t>(r->planned),
                               .position = static_cast<int32_t>(r->computed),
                               .samples = r->remaining() == 0,
                               .new_pages = r->new_pages});
      plan.rows[static_cast<size_t>(kind)] += static_cast<int32_t>(r->planned);
      if (version.adapter->id >= 0 && version.listed != serial) {
        version.listed = serial;
        plan.adapters.push_back({version.adapter->id, version.version});
      }
    }
    if (ordered) continue;  // else an adapter serves pinned requests beside others
    std::stable_sort(plan.segments.begin() + first, plan.segments.end(), [](const Segment& a, const Segment& b) {
      return std::tie(a.adapter, a.version) < std::tie(b.adapter, b.version);
    });
    int32_t row = plan.segments[static_cast<size_t>(first)].row_begin;
    for (auto s = plan.segments.begin() + first; s != plan.segments.end(); ++s) row = std::min(row, s->row_begin);
    for (auto s = plan.segments.begin() + first; s != plan.segments.end(); row += s->rows, ++s) s->row_begin = row;
  }
  plan.preempted = preempted;
  plan.work = work_of(plan, {});
  if (config.cost) plan.predicted = config.cost->predict(plan.work);
  const bool alone = is_alone(plan);
  plan.seconds = alone ? alone_seconds : std::max(train_seconds, plan.rows[3] > 0 ? train_seconds : prompt_seconds);
  plan.interruptible = interruptible(plan);
  plan.chunk_leaves = chunk_leaves(plan);
  return plan;
}

}  // namespace loquetier
