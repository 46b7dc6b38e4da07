-- Limits that hold for several proxies: who of them is here, slots of a limit, connection places. docs/throttling.md has
-- the proof, proxy/throttling/cluster.py is the caller.
--
-- KEYS are all keys that are touched; those of one call have one hash tag. ARGV[1] says what is wanted:
--
--   meet   KEYS: the members. ARGV: id, run, how, by, home, word, replace, members, alone
--          -> time, verdict, word, then of each member id, silent for, alone ago, told
--   slots  KEYS: one for each window. ARGV: id, by, word, most, ahead, then interval and burst of each
--          -> time, verdict, wait, others, then first, step, number of each run
--   places KEYS: one. ARGV: id, by, word, run, generation, used, wanted, claim, limit, share, least, strangers, then
--          each id with + before it, or - if it is silent
--          -> time, verdict, generation, cap, others
--
-- All times are whole microseconds. Nanoseconds since 1970 need 61 bits, and a Lua number is exact to 53: microseconds
-- are, until the year 2255. Where a product or a quotient is not whole, it is rounded to the safe side.
--
-- `by`: later than this (in the time of here) the call means nothing, since the caller has counted it as lost; 0: any
-- time. Verdicts: 0 done, 1 too late, 2 only asked, 3 another run of this id is here.
-- A slot is never given back: what was granted in a lost reply, or is not used, is gone.

local DONE, LATE, ASKED, TAKEN = 0, 1, 2, 3
-- Who wants slots and does not come for them is waited for so long. A limit whose debt is paid is kept so long.
local PATIENCE = 300000
local KEEP = 600000
-- That is said anew once a minute, in microseconds.
local SAID = 60000000
-- Who comes from another store, or from none, has nothing left of it after so long.
local ELSEWHERE = 600000
-- Members that are not heard of any more are forgotten; how long the members' key and places are kept, in ms.
local FORGET = 3600000000
local KEEP_MEMBERS = 86400000
-- Who is silent for longer was away: see `SILENT` in proxy/throttling/membership.py.
local AWAY = 400000
-- Before a limit of places that nothing is known of gives any out, all who hold some have said so.
local CLAIMS = 1000000
-- The same while not all members have come: who does not call gives back what is more than its share meanwhile.
local RETURNS = 60000000

local function clock()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

local function whole(number)
  return string.format('%.0f', number)
end

local function read(key)
  local flat, fields = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do
    fields[flat[i]] = flat[i + 1]
  end
  return fields
end

-- The words of a field, all but the first ones as numbers.
local function split(text, texts)
  local parts = {}
  for part in string.gmatch(text, '%S+') do
    parts[#parts + 1] = #parts < texts and part or tonumber(part)
  end
  return parts
end

local function members(fields)
  local found = {}
  for name, value in pairs(fields) do
    if string.sub(name, 1, 2) == 'm:' then
      found[string.sub(name, 3)] = value
    end
  end
  return found
end

-- ------------------------------------------------------------------ who is here

-- Each member: run, when it was last here, until when it may have gone on with its share alone, and of how many members it
-- was told. What each was told last is what it may take alone: all of it together is never more than the whole, so one
-- more than configured gets a share only when all others know that it is there.
local function meet(time)
  local key, id, run, how, by = KEYS[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
  local home, word, replace, configured = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])
  local state = read(key)
  if state.home ~= home or state.word == replace then
    redis.call('DEL', key)
    redis.call('HSET', key, 'home', home, 'word', word)
    state = {word = word}
  end
  local now = math.max(time, tonumber(state.last or time))
  local known, count, owed = {}, 0, 0
  for other, value in pairs(members(state)) do
    local each = split(value, 1)
    if now - each[2] > FORGET and other ~= id then
      redis.call('HDEL', key, 'm:' .. other)
    else
      known[other], count = each, count + 1
      if other ~= id and each[4] > 0 then
        owed = owed + 1 / each[4]
      end
    end
  end
  local mine, verdict = known[id], DONE
  if how == 'bye' then
    verdict = ASKED
    if mine and mine[1] == run then
      redis.call('HDEL', key, 'm:' .. id)
      known[id] = nil
    end
  elseif how == 'ask' then
    verdict = ASKED
  elseif by > 0 and time > by then
    verdict = LATE
  elseif mine and mine[1] ~= run and now - mine[2] <= AWAY then
    verdict = TAKEN
  else
    if not mine then
      count = count + 1
    end
    local told = math.max(configured, count)
    if owed + 1 / told > 1.000001 then
      told = 0
    end
    known[id] = {run, now, now - tonumber(ARGV[10]), told}
    redis.call('HSET', key, 'last', whole(now), 'm:' .. id,
      run .. ' ' .. whole(now) .. ' ' .. whole(known[id][3]) .. ' ' .. told)
  end
  redis.call('PEXPIRE', key, KEEP_MEMBERS)
  local reply = {time, verdict, state.word}
  for other, each in pairs(known) do
    reply[#reply + 1] = other
    reply[#reply + 1] = now - each[2]
    reply[#reply + 1] = now - each[3]
    reply[#reply + 1] = each[4]
  end
  return reply
end

-- ------------------------------------------------------------------ slots

-- `tat` of another interval, in this one: what is owed stays owed, in slots. One microsecond more than rounding up, for
-- the error of the quotient.
local function rescaled(tat, now, old, new)
  if tat <= now or old == new then
    return tat
  end
  return now + math.ceil((tat - now) * (new / old)) + 1
end

-- Who else waits here, and the least that one of them has had.
local function rivals(fields, id, now)
  local count, least = 0, nil
  local mine = 'm:' .. id
  for name, value in pairs(fields) do
    if string.sub(name, 1, 2) == 'm:' and name ~= mine then
      local had, til = string.match(value, '^(%d+) (%d+)$')
      if tonumber(til) > now then
        count = count + 1
        least = math.min(least or tonumber(had), tonumber(had))
      end
    end
  end
  return count, least
end

local function slots(time)
  local id, by, word, most = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
  local ahead = tonumber(ARGV[6])
  if most == 0 then
    return {time, ASKED, 0, 0}
  elseif by > 0 and time > by then
    return {time, LATE, 0, 0}
  end
  local now, windows, fields = time, {}, {}
  for i, key in ipairs(KEYS) do
    fields[i] = read(key)
    local last = fields[i].word == word and tonumber(fields[i].last) or 0
    now = math.max(now, last)
  end
  for i, key in ipairs(KEYS) do
    local interval, burst = tonumber(ARGV[5 + 2 * i]), tonumber(ARGV[6 + 2 * i])
    local state = fields[i]
    local tat
    if state.word == word then
      tat = rescaled(tonumber(state.tat), now, tonumber(state.interval), interval)
    else
      -- Nothing is known of what was given out before: as much as there can be, and still can be for a while.
      tat = now + math.max(ahead, ELSEWHERE) + burst * interval
      redis.call('DEL', key)
      fields[i] = {}
    end
    windows[i] = {tat = tat, interval = interval, tau = (burst - 1) * interval}
  end
  -- Turns: who has had least comes first, and nobody is waited for beyond half of the time ahead.
  local mine, had, til = fields[1]['m:' .. id], 0, 0
  if mine then
    had, til = string.match(mine, '^(%d+) (%d+)$')
    had, til = tonumber(had), tonumber(til)
  end
  local count, least = rivals(fields[1], id, now)
  if least and til <= now then
    had = math.max(had, least)
  end
  local quota = math.max(1, math.floor(ahead / windows[1].interval / (count + 1)))
  local reply, given, wait = {time, DONE, 0, count}, 0, 0
  local first, step, n = 0, 0, 0
  while given < most do
    local slot = now
    for _, window in ipairs(windows) do
      slot = math.max(slot, window.tat - window.tau)
    end
    if slot > now + ahead then
      wait = slot - ahead - now
      break
    elseif least and had - least >= quota and slot > now + ahead / 2 then
      wait = math.ceil(slot - ahead / 2 - now)
      break
    end
    for _, window in ipairs(windows) do
      window.tat = math.max(window.tat, slot) + window.interval
    end
    given, had = given + 1, had + 1
    local offset = slot - now
    if n == 1 then
      step, n = offset - first, 2
    elseif n > 1 and offset == first + step * n then
      n = n + 1
    else
      if n > 0 then
        reply[#reply + 1] = first
        reply[#reply + 1] = step
        reply[#reply + 1] = n
      end
      first, step, n = offset, 0, 1
    end
  end
  if n > 0 then
    reply[#reply + 1] = first
    reply[#reply + 1] = step
    reply[#reply + 1] = n
  end
  reply[3] = wait
  -- Where nothing has changed nothing is written, but that this one waits.
  local record = given < most and whole(had) .. ' ' .. whole(now + wait + PATIENCE)
  for i, key in ipairs(KEYS) do
    local window, state = windows[i], fields[i]
    local same = tonumber(state.interval) == window.interval  -- else time is paid with another one from now on
    if given > 0 or state.word ~= word or not same then
      local words = {'tat', whole(window.tat), 'last', whole(now), 'word', word, 'interval', whole(window.interval)}
      if tonumber(state.said or 0) + SAID < now or not same then
        words[9], words[10] = 'said', whole(now)
      end
      if record and i == 1 then
        words[#words + 1] = 'm:' .. id
        words[#words + 1] = record
      end
      redis.call('HSET', key, unpack(words))
      if words[9] == 'said' then
        local debt = ahead + window.tau + window.interval + SAID
        redis.call('PEXPIRE', key, whole(math.max(debt, window.tat - now + SAID) / 1000 + KEEP))
      end
    elseif record and i == 1 then
      redis.call('HSET', key, 'm:' .. id, record)
    end
  end
  if not record and mine then
    redis.call('HDEL', KEYS[1], 'm:' .. id)
  end
  return reply
end

-- ------------------------------------------------------------------ places

-- What each may have by max-min fairness: nobody more than it wants. What cannot be divided goes round, every ten seconds.
local function fair(wants, total, time)
  local left, parts, period = total, {}, math.floor(time / 10000000)
  table.sort(wants, function(a, b) return a.id < b.id end)
  for i, each in ipairs(wants) do
    each.turn = (i + period) % #wants
  end
  table.sort(wants, function(a, b)
    if a.want ~= b.want then
      return a.want < b.want
    end
    return a.turn < b.turn
  end)
  for i, each in ipairs(wants) do
    local part = math.min(each.want, math.floor(left / (#wants - i + 1)))
    parts[each.id] = part
    left = left - part
  end
  return parts
end

-- Each member: run, generation, cap, the most that it may believe in, places used and wanted. A cap that falls holds as
-- soon as it is said, but counts here only when the member has said that it knows (its generation).
local function places(time)
  local key, id, by, word, run = KEYS[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
  local generation, used, wanted = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
  local claim, limit, share = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
  local least, strangers = tonumber(ARGV[12]), tonumber(ARGV[13])
  if by > 0 and time > by then
    return {time, LATE, 0, 0, 0}
  end
  local state = read(key)
  if state.word ~= word then
    redis.call('DEL', key)
    state = {word = word, born = whole(time)}
    redis.call('HSET', key, 'word', word, 'born', whole(time))
  end
  local known = members(state)
  local young = time - tonumber(state.born) < (strangers > 0 and RETURNS or CLAIMS)
  local mine = known[id] and split(known[id], 1)
  if mine and mine[1] ~= run then
    mine = nil  -- the sockets of a process end with it
  end
  local held, others, away, short, wants = 0, 0, strangers * share, false, {{id = id, want = used + wanted}}
  for i = 14, #ARGV do
    local other, silent = string.sub(ARGV[i], 2), string.sub(ARGV[i], 1, 1) == '-'
    if other ~= id then
      others = others + 1
      if silent then
        -- It goes on with its share, or has more of what it had.
        local each = known[other] and split(known[other], 1) or {0, 0, 0, 0, 0}
        held = held + math.max(share, each[4], each[5])
        away = away + share
        short = true
      elseif known[other] then
        local each = split(known[other], 1)
        held = held + math.max(least, each[4], each[5])
        wants[#wants + 1] = {id = other, want = math.max(least, each[5] + each[6])}
        short = short or each[5] + each[6] > each[3]
      else
        -- Nothing is known of it: it uses none, or has not said so yet.
        held = held + (young and share or least)
        wants[#wants + 1] = {id = other, want = least}
      end
    end
  end
  held = held + strangers * share
  short = short or strangers > 0
  local cap, ceiling
  if mine then
    cap, ceiling = math.min(mine[3], math.max(least, claim)), mine[4]
    if generation == mine[2] then
      ceiling = cap
    end
  else
    -- What it says it has was given to it when more was known.
    cap = math.max(least, math.min(claim, limit))
    ceiling, mine = cap, {run, generation, cap, cap, 0, 0}
  end
  local target = math.max(least, fair(wants, limit - away, time)[id])
  local now = cap
  if target < cap and short then
    now = target
  elseif not young then
    -- Where nobody lacks any, some more than wanted: the next ones need not wait for a call.
    local spare = used + wanted > 0 and math.ceil(limit / 8) or 0
    local reach = short and target or math.max(target, used + wanted + spare)
    now = math.max(cap, math.min(reach, limit - held))
  end
  local number = mine[2]
  if now ~= mine[3] or not known[id] then
    number = number + 1
  end
  ceiling = math.max(ceiling, now)
  redis.call('HSET', key, 'm:' .. id, run .. ' ' .. whole(number) .. ' ' .. whole(now) .. ' ' .. whole(ceiling) .. ' '
    .. whole(used) .. ' ' .. whole(wanted))
  redis.call('PEXPIRE', key, KEEP_MEMBERS)
  return {time, DONE, number, now, others}
end

local calls = {meet = meet, slots = slots, places = places}
return calls[ARGV[1]](clock())
