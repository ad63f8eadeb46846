-- The limiter of policy/limiter.py over several processes: the same state machine, operation by operation.
-- tests/storage/test_redis_limits.py drives both with one history and compares every answer: change them together.
--
-- KEYS[1]  a hash tag; every key begins with it, so that all of them live on one node of a cluster
-- ARGV[1]  operations: MessagePack, a list of lists whose first element is a number (see `operations` below).
--          0 stands for "without limit" and "not told".
-- ARGV[2]  the replica that sends a heartbeat with these operations, or ""
-- ARGV[3]  the time in seconds, for tests only; else the server's own clock
-- Answer   MessagePack: {living replicas (0 without a heartbeat), {an answer for each operation that has one}}
--
-- State is one MessagePack string for each class, subject and reservation (a hash of decimal fields takes three times
-- as long and rounds), and a sorted set of lease ends for each subject's slots. What is written is written at the end:
-- a script that fails half-way has changed nothing. Every key ends by itself when it says nothing new any more.

local TAG = KEYS[1]
local FREEZE_S_MAX, PROBE_FROM_S, PROBE_S = 300.0, 20.0, 30.0
local REGROWTH, REGROWTH_EVERY_S, FACTOR_MIN = 1.1, 10.0, 1 / 64
local USED_S, USED_MIN = 10.0, 1 / 8
local HALVED_EVERY_S, SLACK, MINUTE_S = 1.0, 1e-6, 60.0
local REPLICA_S, KEPT_S, CLASS_KEPT_S = 3.0, 60.0, 86400.0
local DIMENSIONS = { 'rpm', 'itpm', 'otpm' }
local INF, min, max = math.huge, math.min, math.max
local pack, unpack = cmsgpack.pack, cmsgpack.unpack

local now
if ARGV[3] then
  now = tonumber(ARGV[3])
else
  -- Counted from 2023, so that a double still tells 15 ns apart.
  local time = redis.call('TIME')
  now = (tonumber(time[1]) - 1700000000) + tonumber(time[2]) / 1000000
end
local NOW = string.format('%.17g', now)

-- The number is that of the layout: a version that stores something else counts by itself for as long as both run.
local function key(kind, id)
  return TAG .. ':1:' .. kind .. ':' .. id
end

-- What is stored under a key, or false; what cannot be read is as good as lost.
local function read(kind, id)
  local stored = redis.call('GET', key(kind, id))
  local whole, state = pcall(unpack, stored)
  return stored and whole and type(state) == 'table' and state
end

-- What was read in this call, and is written at its end; subjects and reservations: {state or false, seconds to keep it}.
local classes, subjects, reservations, slots = {}, {}, {}, {}

-- Buckets

local function refilled(level, at, rate_s, capacity)
  if now > at then level = level + (now - at) * rate_s end
  return min(level, capacity)
end

local function wait_s(level, need, rate_s, capacity)
  local short = min(need, capacity) - level
  if short <= SLACK then return 0.0 end
  return rate_s > 0.0 and short / rate_s or INF
end

local function capacity_of(per_minute, burst_s)
  return max(per_minute / MINUTE_S * burst_s, 1.0)
end

-- Factors: {value, at}

local function factor(one, at)
  if one[1] >= 1.0 then return 1.0 end
  local grown = max(at - one[2], 0.0) / REGROWTH_EVERY_S
  if grown > 100.0 then return 1.0 end
  return min(1.0, one[1] * REGROWTH ^ grown)
end

local function halve(one, used)
  local value = factor(one, now)
  if value >= 1.0 then value = min(max(used, USED_MIN), 1.0) end
  one[1], one[2] = max(value / 2, FACTOR_MIN), now
end

-- Classes: {levels, at, taken, used, sent, synced, learned, frozen until, probe, pace, burst, halved at}
local LEVELS, AT, TAKEN, USED, SENT, SYNCED, LEARNED, FROZEN, PROBE, PACE, BURST, HALVED = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12

local function class_of(id)
  local state = classes[id]
  if not state then
    state = read('class', id)
    if not state then
      state = { { INF, INF, INF }, now, { 0, 0, 0 }, { 0, 0, 0 }, 0, 0, { 0, 0, 0 }, -INF, '', { 1, 0 }, { 1, 0 }, -INF }
    end
    classes[id] = state
  end
  return state
end

-- limits: {rpm, itpm, otpm, burst_s, learn}

local function limit_of(state, limits, d)
  local configured, learned = limits[d], state[LEARNED][d]
  if learned == 0 then return configured end
  if limits[5] or configured == 0 then return learned end
  return min(configured, learned)
end

-- Brings the levels to now; returns rates and capacities.
local function refill(state, limits)
  local burst = factor(state[BURST], now)
  if burst >= 1.0 then state[BURST][1] = 1.0 end
  local rates, capacities, levels, used = {}, {}, state[LEVELS], state[USED]
  for d = 1, 3 do
    local limit = limit_of(state, limits, d)
    rates[d] = limit / MINUTE_S
    if limit == 0 then
      levels[d], capacities[d] = INF, INF
    else
      capacities[d] = max(rates[d] * limits[4] * burst, 1.0)
    end
  end
  local elapsed_s = now - state[AT]
  if elapsed_s > 0 then
    local pace = factor(state[PACE], state[AT])
    local kept = max(1.0 - elapsed_s / USED_S, 0.0)
    state[AT] = now
    for d = 1, 3 do
      levels[d] = levels[d] + elapsed_s * (rates[d] * pace)
      used[d] = used[d] * kept
    end
  end
  for d = 1, 3 do
    if levels[d] > capacities[d] then levels[d] = capacities[d] end
  end
  return rates, capacities
end

local function take(state, d, amount)
  state[LEVELS][d] = state[LEVELS][d] - amount
  state[TAKEN][d] = state[TAKEN][d] + amount
  state[USED][d] = state[USED][d] + amount
end

local function share_used(state, rates)
  local share
  for d = 1, 3 do
    if rates[d] > 0 then share = max(share or -INF, state[USED][d] / (rates[d] * USED_S)) end
  end
  return share or 1.0
end

-- Subjects: {requests, output, at}; as told: {id, rpm, otpm, concurrency, burst_s}
local function subject_of(id)
  local one = subjects[id]
  if one == nil then
    one = { read('subject', id), 0 }
    subjects[id] = one
  end
  return one
end

local function refill_subject(entry, subject)
  local state = entry[1]
  if subject[2] ~= 0 then
    local capacity = capacity_of(subject[2], subject[5])
    state[1] = refilled(state[1], state[3], subject[2] / MINUTE_S, capacity)
  end
  if subject[3] ~= 0 then
    local capacity = capacity_of(subject[3], subject[5])
    state[2] = refilled(state[2], state[3], subject[3] / MINUTE_S, capacity)
  end
  state[3] = max(state[3], now)
end

-- For how long a subject has to be remembered: until both buckets are full.
local function keep_subject(entry, subject)
  for d = 1, 2 do
    local limit, level = subject[d + 1], entry[1][d]
    if limit ~= 0 then
      entry[2] = max(entry[2], (capacity_of(limit, subject[5]) - level) * MINUTE_S / limit)
    end
  end
end

-- Slots of a subject: a sorted set from attempt to the end of its lease, and what this call changes in it.
local function slots_of(id)
  local one = slots[id]
  if not one then
    one = { changed = {} }
    slots[id] = one
  end
  return one
end

local function lease_end(id, ask_id)
  local changed = slots_of(id).changed[ask_id]
  if changed ~= nil then return changed end
  local score = redis.call('ZSCORE', key('slots', id), ask_id)
  return score and tonumber(score) or false
end

local function busy(id)
  local one = slots_of(id)
  if not one.count then
    one.count = redis.call('ZCOUNT', key('slots', id), '(' .. NOW, '+inf')
    for ask_id, ends in pairs(one.changed) do
      local score = redis.call('ZSCORE', key('slots', id), ask_id)
      if score and tonumber(score) > now then one.count = one.count - 1 end
      if ends and ends > now then one.count = one.count + 1 end
    end
  end
  return one.count
end

local function set_slot(id, ask_id, ends)
  local one = slots_of(id)
  if one.count then
    local before = lease_end(id, ask_id)
    if before and before > now then one.count = one.count - 1 end
    if ends and ends > now then one.count = one.count + 1 end
  end
  one.changed[ask_id] = ends
end

-- Reservations: {class, limits, subjects, input, output, spent, sequence, marks, at, expires at}
local function held(ask_id)
  local one = reservations[ask_id]
  if one == nil then
    one = { read('ask', ask_id), 0 }
    reservations[ask_id] = one
  end
  local reservation = one[1]
  return reservation and reservation[10] > now and reservation or nil
end

local function keep_reservation(ask_id, reservation, lease_s)
  reservations[ask_id] = { reservation, lease_s }
end

-- Decisions. A denial is {wait, reason, pace}.

local function denied_subject(told)
  local worst
  for _, subject in ipairs(told) do
    local entry = subject_of(subject[1])
    local function waits(what, wait)
      if wait > 0 and (not worst or wait > worst[1]) then
        worst = { wait, string.match(subject[1], '^[^:]*') .. '_' .. what, 1 }
      end
    end
    if entry[1] then
      local state = entry[1]
      refill_subject(entry, subject)
      keep_subject(entry, subject)
      if subject[2] ~= 0 then
        waits('rpm', wait_s(state[1], 1.0, subject[2] / MINUTE_S, capacity_of(subject[2], subject[5])))
      end
      if subject[3] ~= 0 then
        waits('otpm', wait_s(state[2], 1.0, subject[3] / MINUTE_S, capacity_of(subject[3], subject[5])))
      end
    end
    if subject[4] ~= 0 then
      slots_of(subject[1]).pruned = true
      if busy(subject[1]) >= subject[4] then waits('concurrency', INF) end
    end
  end
  return worst
end

local function denied_class(state, limits, input_tokens, output_tokens)
  local rates, capacities = refill(state, limits)
  local pace = factor(state[PACE], now)
  if now < state[FROZEN] then return { state[FROZEN] - now, 'frozen', pace } end
  local needs, worst, worst_wait = { 1.0, input_tokens, output_tokens }, 1, 0.0
  for d = 1, 3 do
    if capacities[d] < INF then
      local wait = wait_s(state[LEVELS][d], needs[d], rates[d] * pace, capacities[d])
      if wait > worst_wait then worst, worst_wait = d, wait end
    end
  end
  if worst_wait > 0 then return { worst_wait, 'class_' .. DIMENSIONS[worst], pace } end
end

local function charge(reservation, input_tokens, output_tokens, produced)
  local state = class_of(reservation[1])
  refill(state, reservation[2])
  take(state, 2, input_tokens - reservation[4])
  take(state, 3, output_tokens - reservation[5])
  reservation[4], reservation[5] = input_tokens, output_tokens
  local more = produced - reservation[6]
  if more <= 0 then return end
  reservation[6] = produced
  for _, subject in ipairs(reservation[3]) do
    local entry = subject_of(subject[1])
    if subject[3] ~= 0 and entry[1] then
      refill_subject(entry, subject)
      entry[1][2] = entry[1][2] - more
      keep_subject(entry, subject)
    end
  end
end

local function thaw(ask_id, reservation)
  local state = class_of(reservation[1])
  if state[PROBE] == ask_id then state[PROBE], state[FROZEN] = '', now end
end

-- Adds what each subject has left, for the caller to tell it.
local function with_levels(answer, told)
  for _, subject in ipairs(told) do
    local state = subject_of(subject[1])[1]
    answer[#answer + 1] = subject[2] == 0 and 0 or state and state[1] or capacity_of(subject[2], subject[5])
  end
  return answer
end

local blocked = {}

-- {1, id, class, limits, subjects, input, output, lease_s} → {wait, reason ("": admitted), pace, level of each subject}
local function admit(op)
  local id, class, limits, told, input_tokens, output_tokens, lease_s = op[2], op[3], op[4], op[5], op[6], op[7], op[8]
  local state = class_of(class)
  local denied = denied_subject(told)
  if not denied then
    -- Nobody passes, in what is sent together, the one who was denied first.
    denied = blocked[class] or denied_class(state, limits, input_tokens, output_tokens)
    blocked[class] = denied
  end
  if denied then return with_levels({ denied[1], denied[2], denied[3] }, told) end
  for _, subject in ipairs(told) do
    local entry = subject_of(subject[1])
    if not entry[1] then
      entry[1] = { INF, INF, now }
      refill_subject(entry, subject)
    end
    if subject[2] ~= 0 then entry[1][1] = entry[1][1] - 1 end
    if subject[4] ~= 0 then set_slot(subject[1], id, now + lease_s) end
    keep_subject(entry, subject)
  end
  take(state, 1, 1.0)
  take(state, 2, input_tokens)
  take(state, 3, output_tokens)
  state[SENT] = state[SENT] + 1
  local marks = { state[TAKEN][1], state[TAKEN][2], state[TAKEN][3] }
  local reservation = { class, limits, told, input_tokens, output_tokens, 0, state[SENT], marks, now, now + lease_s }
  keep_reservation(id, reservation, lease_s)
  if state[PROBE] ~= '' then state[PROBE], state[FROZEN] = id, now + PROBE_S end
  return with_levels({ 0, '', factor(state[PACE], now) }, told)
end

-- {2, id, input, output}
local function correct(op)
  local reservation = held(op[2])
  if not reservation then return end
  thaw(op[2], reservation)
  charge(reservation, op[3], max(op[4], reservation[5]), op[4])
  keep_reservation(op[2], reservation, reservation[10] - now)
end

-- {3, id, input, output}
local function settle(op)
  local id, reservation = op[2], held(op[2])
  if not reservation then return end
  local state = class_of(reservation[1])
  if state[PROBE] == id then state[PROBE], state[FROZEN] = '?', now end
  charge(reservation, op[3], op[4], op[4])
  reservations[id] = { false, 1 }
  for _, subject in ipairs(reservation[3]) do
    if subject[4] ~= 0 then set_slot(subject[1], id, false) end
  end
end

-- {4, id, lease_s}
local function renew(op)
  local id, lease_s, reservation = op[2], op[3], held(op[2])
  if not reservation then return end
  reservation[10] = now + lease_s
  keep_reservation(id, reservation, lease_s)
  for _, subject in ipairs(reservation[3]) do
    if subject[4] ~= 0 and lease_end(subject[1], id) then set_slot(subject[1], id, now + lease_s) end
  end
end

-- {5, id, limit and remaining of requests, of input, of output}
local function observe(op)
  local reservation = held(op[2])
  if not reservation then return end
  local state = class_of(reservation[1])
  thaw(op[2], reservation)
  local rates = refill(state, reservation[2])
  -- A class that was lost and begun anew knows nothing of an attempt from before.
  if reservation[7] > state[SENT] then return end
  local refilling_s = max(now - reservation[9], 0.0) * factor(state[PACE], reservation[9])
  local newest = reservation[7] >= state[SYNCED]
  state[SYNCED] = max(state[SYNCED], reservation[7])
  for d = 1, 3 do
    local limit, remaining = op[1 + 2 * d], op[2 + 2 * d]
    if limit > 0 then
      state[LEARNED][d] = limit
      if newest then
        local since = state[TAKEN][d] - reservation[8][d]
        state[LEVELS][d] = min(state[LEVELS][d], remaining + refilling_s * rates[d] - since)
      end
    end
  end
end

-- {6, class, limits, retry_after_s or -1, ramp}
local function throttled(op)
  local state, limits, retry_after_s = class_of(op[2]), op[3], op[4]
  local rates, capacities = refill(state, limits)
  if state[PROBE] ~= '' and state[PROBE] ~= '?' then state[FROZEN] = now end
  if now >= state[FROZEN] and now - state[HALVED] >= HALVED_EVERY_S then
    state[HALVED] = now
    if op[5] then halve(state[PACE], share_used(state, rates)) else halve(state[BURST], 1.0) end
  end
  for d = 1, 3 do
    if capacities[d] < INF then state[LEVELS][d] = min(state[LEVELS][d], 0.0) end
  end
  if retry_after_s >= 0 then
    local freeze_s = min(retry_after_s, FREEZE_S_MAX)
    state[FROZEN] = max(state[FROZEN], now + freeze_s)
    if freeze_s >= PROBE_FROM_S or state[PROBE] ~= '' then state[PROBE] = '?' end
  end
end

-- {7, class, limits, requests, input, output}
local function owe(op)
  local state = class_of(op[2])
  refill(state, op[3])
  for d = 1, 3 do take(state, d, op[3 + d]) end
end

-- {8, class, limits} → {limits, levels, learned, frozen_s, pace, burst}
local function snapshot(op)
  local state, limits = class_of(op[2]), op[3]
  refill(state, limits)
  return {
    { limit_of(state, limits, 1), limit_of(state, limits, 2), limit_of(state, limits, 3) },
    { state[LEVELS][1], state[LEVELS][2], state[LEVELS][3] },
    state[LEARNED],
    max(state[FROZEN] - now, 0.0),
    factor(state[PACE], now),
    factor(state[BURST], now),
  }
end

local operations = { admit, correct, settle, renew, observe, throttled, owe, snapshot }

local answers = {}
for _, op in ipairs(unpack(ARGV[1])) do
  local answer = operations[op[1]](op)
  if answer then answers[#answers + 1] = answer end
end

-- Writing

local function store(name, state, seconds)
  redis.call('SET', name, pack(state), 'PX', string.format('%.0f', (seconds + KEPT_S) * 1000))
end

for id, state in pairs(classes) do store(key('class', id), state, CLASS_KEPT_S) end
for id, entry in pairs(subjects) do
  if entry[1] then store(key('subject', id), entry[1], entry[2]) end
end
for id, entry in pairs(reservations) do
  if entry[1] and entry[2] > 0 then
    store(key('ask', id), entry[1], entry[2])
  elseif entry[2] > 0 then
    redis.call('DEL', key('ask', id))
  end
end
for id, one in pairs(slots) do
  local name = key('slots', id)
  local written = false
  if one.pruned then redis.call('ZREMRANGEBYSCORE', name, '-inf', NOW) end
  for ask_id, ends in pairs(one.changed) do
    if ends then
      redis.call('ZADD', name, string.format('%.17g', ends), ask_id)
      written = true
    else
      redis.call('ZREM', name, ask_id)
    end
  end
  if written then
    local last = redis.call('ZREVRANGE', name, 0, 0, 'WITHSCORES')
    redis.call('PEXPIRE', name, string.format('%.0f', (tonumber(last[2]) - now + KEPT_S) * 1000))
  end
end

local replicas = 0
if ARGV[2] ~= '' then
  local name = key('replicas', 'living')
  redis.call('ZADD', name, NOW, ARGV[2])
  redis.call('ZREMRANGEBYSCORE', name, '-inf', string.format('%.17g', now - REPLICA_S))
  redis.call('PEXPIRE', name, string.format('%.0f', 10 * REPLICA_S * 1000))
  replicas = redis.call('ZCARD', name)
end
return pack({ replicas, answers })
