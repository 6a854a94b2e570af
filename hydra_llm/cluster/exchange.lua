-- One exchange of a router with the others: what it holds, what it asks for, what it sees.
--
-- KEYS   the routers (sorted set: router -> when it counts as gone, ms), the counter of changes,
--        the waiting lines (hash: router -> "<ms> <json>"), then one hash a node of its leases
--        (lease id -> "<started at, ms> <json>"); a lease id begins with its router's.
-- ARGV   one message as JSON, see exchange.py.
-- Gives  {"unknown"} if this router has to say all that it holds first, else
--        {"ok", changes, granted as 0 and 1, leases of the others or false, their lines}.
--
-- All times are this server's, so no two machines need agree on one. A lease lasts as long as
-- its router is heard of.
local routers, changes, lines = KEYS[1], KEYS[2], KEYS[3]
local FIRST_NODE = 3
local message = cjson.decode(ARGV[1])
local me, ttl = message.router, message.ttl_ms
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local changed = false

local function ms(number)
  return string.format('%.0f', number)
end

local function owner_of(id)
  return string.match(id, '^[^:]*')
end

-- ---------------------------------------------------------------- who is there

local gone = redis.call('ZRANGEBYSCORE', routers, '-inf', ms(now))
for _, router in ipairs(gone) do
  redis.call('ZREM', routers, router)
  redis.call('HDEL', lines, router)
  changed = true
end

local good_until = redis.call('ZSCORE', routers, me)
if not good_until and not message.full then
  return {'unknown'}
end
if not good_until or good_until - now < ttl * 2 / 3 then
  redis.call('ZADD', routers, ms(now + ttl), me)
  -- Nothing stays for good once nobody is left.
  for _, key in ipairs(KEYS) do
    redis.call('PEXPIRE', key, ttl * 4)
  end
end

-- Never a number that it has been before, even if the counter was lost meanwhile.
local before = redis.call('GET', changes)
if not before then
  before = ms(now)
  redis.call('SET', changes, before, 'PX', ttl * 4)
end

local here = {}
local function is_here(router)
  if here[router] == nil then
    here[router] = redis.call('ZSCORE', routers, router) and true or false
  end
  return here[router]
end

local function leases_at(node)
  local flat = redis.call('HGETALL', KEYS[FIRST_NODE + node])
  local leases = {}
  for i = 1, #flat, 2 do
    if is_here(owner_of(flat[i])) then
      leases[flat[i]] = flat[i + 1]
    else
      redis.call('HDEL', KEYS[FIRST_NODE + node], flat[i])
      changed = true
    end
  end
  return leases
end

local function put(node, id, age_ms, json)
  redis.call('HSET', KEYS[FIRST_NODE + node], id, ms(now - age_ms) .. ' ' .. json)
  redis.call('PEXPIRE', KEYS[FIRST_NODE + node], ttl * 4)
  changed = true
end

local function parts_of(value)
  local started, json = string.match(value, '^(%d+) (.*)$')
  return tonumber(started), json
end

-- ------------------------------------------------------------------ what it holds

if message.full then
  for node = 1, #KEYS - FIRST_NODE do
    for id in pairs(leases_at(node)) do
      if owner_of(id) == me then
        redis.call('HDEL', KEYS[FIRST_NODE + node], id)
        changed = true
      end
    end
  end
end
if message.leave then
  redis.call('ZREM', routers, me)
  redis.call('HDEL', lines, me)
  redis.call('INCR', changes)
  return {'unknown'}
end
for _, one in ipairs(message.drop) do
  if redis.call('HDEL', KEYS[FIRST_NODE + one.node], one.id) == 1 then
    changed = true
  end
end
for _, one in ipairs(message.put) do
  put(one.node, one.id, one.age_ms, one.lease)
end
if message.line ~= '' then
  redis.call('HSET', lines, me, ms(now) .. ' ' .. message.line)
  redis.call('PEXPIRE', lines, ttl * 4)
else
  redis.call('HDEL', lines, me)
end

-- --------------------------------------------------------------- what it asks for

-- As has_room() in scheduling/scheduler.py, and: whoever chose to load has seen all loads there.
local function has_room(asked)
  local known, held = {}, 0
  for _, id in ipairs(asked.known_loads) do
    known[id] = true
  end
  for id, value in pairs(leases_at(asked.node)) do
    local _, json = parts_of(value)
    local lease = cjson.decode(json)
    if id ~= asked.id then
      if lease.model == asked.model then
        held = held + 1
      end
      if lease.loading and owner_of(id) ~= me then
        if asked.loads and not known[id] then
          return false
        end
        for _, model in ipairs(lease.evicts) do
          if model == asked.model then
            return false
          end
        end
      end
    end
  end
  return held < asked.room
end

local granted, refused = {}, false
for i, asked in ipairs(message.claim) do
  if has_room(asked) then
    granted[i] = 1
    put(asked.node, asked.id, 0, asked.lease)
  else
    granted[i] = 0
    refused = true
  end
end

-- -------------------------------------------------------------------- what it sees

local seen = false
if message.full or refused or before ~= message.seen or #gone > 0 then
  seen = {}
  for node = 1, #KEYS - FIRST_NODE do
    seen[node] = {}
    for id, value in pairs(leases_at(node)) do
      local started, json = parts_of(value)
      if owner_of(id) ~= me and started then
        local list = seen[node]
        list[#list + 1] = id
        list[#list + 1] = now - started
        list[#list + 1] = json
      end
    end
  end
end

local waiting = {}
local flat = redis.call('HGETALL', lines)
for i = 1, #flat, 2 do
  local since, json = parts_of(flat[i + 1])
  if flat[i] ~= me and since and is_here(flat[i]) then
    waiting[#waiting + 1] = now - since
    waiting[#waiting + 1] = json
  end
end

local after = before
if changed then
  after = ms(redis.call('INCR', changes))
end
return {'ok', after, granted, seen, waiting}
