-- The budgets of policy/budgets.py over several processes: the same state machine, operation by operation.
-- tests/storage/test_redis_money.py drives both with one history and compares every answer: change them together.
--
-- KEYS[1]  a hash tag; every key begins with it, so that all of them live on one node of a cluster
-- ARGV[1]  operations: MessagePack, a list of lists whose first element is a number (see `operations` below)
-- ARGV[2]  the time in seconds, for tests only; else the server's own clock
-- Answer   MessagePack: {generation, number of attempts that have expired, {an answer for each operation}}. The
--          generation is '' where nothing was counted yet, or something was lost: then every answer is {}, and nothing
--          changes until a `correct` begins anew.
--
-- A day and a month are a hash each, of `s:ACCOUNT` (settled) and `r:ACCOUNT` (reserved), changed by HINCRBY and so
-- exact. The generation is a hash that also names the periods there are: one that is named and not there was lost.
-- An attempt is a MessagePack string {state, amount, {{period, account, cap or -1}, ...}, end of lease}; sorted sets
-- hold the ends of leases, and of the memory of what was settled and what has expired.

local TAG = KEYS[1]
local LATELY_S = 20.0
local KEPT_S, DAY_KEPT_S, MONTH_KEPT_S = 86400, 3 * 86400, 63 * 86400
local ENDED_MAX = 500 -- leases and memories that one call ends
local LIVE, SETTLED, EXPIRED = 1, 2, 3
local max, min = math.max, math.min
local spread = unpack
local pack, unpack = cmsgpack.pack, cmsgpack.unpack

local now
if ARGV[2] then
  now = tonumber(ARGV[2])
else
  local time = redis.call('TIME')
  now = (tonumber(time[1]) - 1700000000) + tonumber(time[2]) / 1000000
end

local function number(value) return string.format('%.17g', value) end
local function whole(value) return string.format('%.0f', value) end

-- The number is that of the layout: a version that stores something else counts by itself for as long as both run.
local function key(kind, id) return TAG .. ':1:money:' .. kind .. (id and ':' .. id or '') end

local GENERATION, ENDS, LATELY, LOST = key('generation'), key('ends'), key('lately'), key('expired')
local generation = redis.call('HGET', GENERATION, 'id') or ''

local seen = {}

-- The name of a period's hash. One that was known and is not there was lost, and everything with it.
local function period_of(name)
  if seen[name] then return seen[name] end
  local at = key('period', name)
  seen[name] = at
  if redis.call('EXISTS', at) == 0 then
    if redis.call('HSETNX', GENERATION, name, 1) == 0 then
      redis.call('DEL', GENERATION)
      generation = ''
    end
    redis.call('HSET', at, 'since', number(now))
    redis.call('EXPIRE', at, string.sub(name, 1, 1) == 'd' and DAY_KEPT_S or MONTH_KEPT_S)
  end
  return at
end

local function value_of(name, what, account)
  return tonumber(redis.call('HGET', period_of(name), what .. ':' .. account) or '0')
end

local function add(name, what, account, delta)
  if delta ~= 0 then redis.call('HINCRBY', period_of(name), what .. ':' .. account, whole(delta)) end
end

local function read(id)
  local stored = redis.call('GET', key('ask', id))
  local good, attempt = pcall(unpack, stored)
  return stored and good and type(attempt) == 'table' and attempt
end

-- Which sorted set an attempt stands in, by its state.
local INDEX = { ENDS, LATELY, LOST }

-- Keeps an attempt as it is now; `before` is its state until here.
local function write(id, attempt, before)
  redis.call('SET', key('ask', id), pack(attempt), 'EX', whole(max(attempt[4] - now, 0) + KEPT_S))
  if before and before ~= attempt[1] then redis.call('ZREM', INDEX[before], id) end
  redis.call('ZADD', INDEX[attempt[1]], number(attempt[4]), id)
end

local function forget(id, state)
  redis.call('DEL', key('ask', id))
  redis.call('ZREM', INDEX[state], id)
end

local function left(window)
  return window[3] - value_of(window[1], 's', window[2]) - value_of(window[1], 'r', window[2])
end

-- From reserved to booked.
local function release(attempt)
  if attempt[1] ~= LIVE then return end
  for _, window in ipairs(attempt[3]) do
    add(window[1], 'r', window[2], -attempt[2])
    add(window[1], 's', window[2], attempt[2])
  end
  attempt[1] = EXPIRED
end

-- Its amount becomes this one.
local function book(attempt, nanousd)
  local delta, what = nanousd - attempt[2], attempt[1] == LIVE and 'r' or 's'
  attempt[2] = nanousd
  for _, window in ipairs(attempt[3]) do add(window[1], what, window[2], delta) end
end

local function expire()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', ENDS, '-inf', number(now), 'LIMIT', 0, ENDED_MAX)) do
    local attempt = read(id)
    if attempt and attempt[1] == LIVE then
      release(attempt)
      write(id, attempt, LIVE)
    else
      redis.call('ZREM', ENDS, id)
    end
  end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', LATELY, '-inf', number(now), 'LIMIT', 0, ENDED_MAX)) do
    forget(id, SETTLED)
  end
end

-- The nearest window of those that have a cap, then settled and reserved of each.
local function told(admitted, windows, uses)
  local answer, nearest, nearest_left = { admitted }, 0, nil
  for at, window in ipairs(windows) do
    local settled, reserved = uses[2 * at - 1], uses[2 * at]
    local rest = window[3] - settled - reserved
    -- Of two alike the month.
    if not nearest_left or rest < nearest_left or (rest == nearest_left and string.sub(window[1], 1, 1) == 'm'
      and string.sub(windows[nearest][1], 1, 1) == 'd') then
      nearest, nearest_left = at, rest
    end
    answer[2 * at + 1], answer[2 * at + 2] = settled, reserved
  end
  answer[2] = nearest
  return answer
end

-- {1, id, windows, upper, lease_s} -> {1 admitted or 0, the nearest, settled and reserved of each}
local function reserve(op)
  local id, windows, upper, lease_s = op[2], op[3], op[4], op[5]
  local uses, fits = {}, true
  for at, window in ipairs(windows) do
    local two = redis.call('HMGET', period_of(window[1]), 's:' .. window[2], 'r:' .. window[2])
    uses[2 * at - 1], uses[2 * at] = tonumber(two[1] or '0'), tonumber(two[2] or '0')
    fits = fits and window[3] - uses[2 * at - 1] - uses[2 * at] >= upper
  end
  if generation == '' then return {} end
  local known = read(id)
  if known then return told(known[1] == LIVE and 1 or 0, windows, uses) end
  if not fits then return told(0, windows, uses) end
  for at, window in ipairs(windows) do
    add(window[1], 'r', window[2], upper)
    uses[2 * at] = uses[2 * at] + upper
  end
  write(id, { LIVE, upper, windows, now + lease_s })
  return told(1, windows, uses)
end

-- {2, id, nanousd}
local function settle(op)
  local attempt = read(op[2])
  if not attempt or attempt[1] == SETTLED then return 0 end
  local before = attempt[1]
  release(attempt)
  book(attempt, op[3])
  attempt[1], attempt[4] = SETTLED, now + LATELY_S
  write(op[2], attempt, before)
  return 1
end

-- {3, id, lease_s}
local function renew(op)
  local attempt = read(op[2])
  if not attempt or attempt[1] == SETTLED then return 0 end
  local before = attempt[1]
  if before == EXPIRED then
    for _, window in ipairs(attempt[3]) do
      add(window[1], 's', window[2], -attempt[2])
      add(window[1], 'r', window[2], attempt[2])
    end
    attempt[1] = LIVE
  end
  attempt[4] = now + op[3]
  write(op[2], attempt, before)
  return 1
end

-- {4, id, nanousd} -> 1, or 0: there is no room for it
local function spend(op)
  local attempt = read(op[2])
  if not attempt or attempt[1] == SETTLED then return 1 end
  local more = op[3] - attempt[2]
  if more <= 0 then return 1 end
  for _, window in ipairs(attempt[3]) do
    if window[3] >= 0 and left(window) < more then return 0 end
  end
  book(attempt, op[3])
  write(op[2], attempt, attempt[1])
  return 1
end

-- {5, id, windows, nanousd, live, lease_s}
local function owe(op)
  local id, attempt = op[2], read(op[2])
  if not attempt then
    attempt = { EXPIRED, 0, op[3], now }
    write(id, attempt)
  end
  if not op[5] then return settle({ 2, id, op[4] }) end
  renew({ 3, id, op[6] })
  attempt = read(id)
  if attempt[1] == LIVE and op[4] > attempt[2] then
    book(attempt, op[4])
    write(id, attempt, LIVE)
  end
  return 1
end

-- {6, {{period, account}, ...}} -> settled and reserved of each
local function look(op)
  local answer = {}
  for _, window in ipairs(op[2]) do
    answer[#answer + 1] = value_of(window[1], 's', window[2])
    answer[#answer + 1] = value_of(window[1], 'r', window[2])
  end
  return answer
end

-- {7, {period, ...}} -> {{fields and values of each period}, {{id, state, amount, {window, ...}}, ...}}
local function cut(op)
  local sums, held = {}, {}
  for at, period in ipairs(op[2]) do sums[at] = redis.call('HGETALL', period_of(period)) end
  for _, index in ipairs(INDEX) do
    for _, id in ipairs(redis.call('ZRANGE', index, 0, -1)) do
      local attempt, windows = read(id), {}
      if attempt then
        for at, window in ipairs(attempt[3]) do windows[at] = window[1] .. ':' .. window[2] end
        held[#held + 1] = { id, attempt[1], attempt[2], windows }
      else
        redis.call('ZREM', index, id)
      end
    end
  end
  return { sums, held }
end

-- {8, generation it is for, a new one, {period, ...}, {period, account, delta, ...}, {id, ...}, {{id, nanousd, windows}, ...},
--  whose ledger}
-- -> 1, or 0: somebody else was first, or 2: processes with ledgers of their own share this count, and what one of them
-- reads lacks what the others spent. Then nobody corrects it, and what has expired stays booked.
local function correct(op)
  local deltas = op[5]
  if op[2] ~= generation then return 0 end
  if generation ~= '' then
    if redis.call('HGET', GENERATION, 'ledger') ~= op[8] then redis.call('HSET', GENERATION, 'mixed', 1) end
    if redis.call('HEXISTS', GENERATION, 'mixed') == 1 then return 2 end
  end
  if generation == '' then
    -- Begun anew: what may be left of before does not count.
    for _, index in ipairs(INDEX) do
      for _, id in ipairs(redis.call('ZRANGE', index, 0, -1)) do redis.call('DEL', key('ask', id)) end
      redis.call('DEL', index)
    end
    redis.call('DEL', GENERATION)
    for _, period in ipairs(op[4]) do redis.call('DEL', key('period', period)) end
    seen, generation = {}, op[3]
    redis.call('HSET', GENERATION, 'id', generation, 'ledger', op[8])
  end
  local by_period = {}
  for at = 1, #deltas, 3 do
    local fields = by_period[deltas[at]] or {}
    by_period[deltas[at]] = fields
    if op[2] == '' then
      fields[#fields + 1] = 's:' .. deltas[at + 1]
      fields[#fields + 1] = whole(deltas[at + 2])
    else
      add(deltas[at], 's', deltas[at + 1], deltas[at + 2])
    end
  end
  for period, fields in pairs(by_period) do
    for at = 1, #fields, 200 do
      redis.call('HSET', period_of(period), spread(fields, at, min(at + 199, #fields)))
    end
  end
  for _, one in ipairs(op[7]) do
    if not read(one[1]) then
      local attempt = { EXPIRED, 0, one[3], now }
      book(attempt, one[2])
      write(one[1], attempt)
    end
  end
  for _, id in ipairs(op[6]) do
    local attempt = read(id)
    if attempt and attempt[1] == EXPIRED then
      book(attempt, 0)
      forget(id, EXPIRED)
    end
  end
  return 1
end

local operations = { reserve, settle, renew, spend, owe, look, cut, correct }
local CORRECT = 8

if generation ~= '' then expire() end
local answers = {}
for at, op in ipairs(unpack(ARGV[1])) do
  if generation == '' and op[1] ~= CORRECT then
    answers[at] = {}
  else
    answers[at] = operations[op[1]](op)
  end
end
return pack({ generation, redis.call('ZCARD', LOST), answers })
