-- Takes in what a router has measured, and gives what all have measured together.
--
-- KEYS   one hash a node: "<kind> <digest> <model>" -> "<mean or logarithm of it> <samples>".
-- ARGV   one message as JSON: the samples, means to go on from where less than those is known,
--        and the rule by which samples count, see rates.py.
-- Gives  each node's hash, as name, value, name, value ...
--
-- The mean is Average.add() of learning.py.
local message = cjson.decode(ARGV[1])

local function number(value)
  return string.format('%.17g', value)
end

for _, seed in ipairs(message.seeds) do
  local before = redis.call('HGET', KEYS[seed.node], seed.name)
  local samples = before and tonumber(string.match(before, ' (%d+)$')) or 0
  if seed.samples > samples then
    local value = number(seed.value) .. ' ' .. string.format('%d', seed.samples)
    redis.call('HSET', KEYS[seed.node], seed.name, value)
    redis.call('EXPIRE', KEYS[seed.node], message.kept_seconds)
  end
end

for _, sample in ipairs(message.samples) do
  local key = KEYS[sample.node]
  if sample.is_latest then
    redis.call('HSET', key, sample.name, number(sample.value) .. ' 1')
  else
    local before = redis.call('HGET', key, sample.name)
    local mean, samples = sample.value, 0
    if before then
      mean, samples = string.match(before, '^(%S+) (%d+)$')
      mean, samples = tonumber(mean), tonumber(samples)
    end
    if mean and samples and samples > 0 then
      local step = sample.value - mean
      if samples >= message.settled_samples then
        step = math.max(-message.step_limit, math.min(message.step_limit, step))
      end
      mean = mean + math.max(message.weight, 1 / (samples + 1)) * step
    else
      mean, samples = sample.value, 0
    end
    redis.call('HSET', key, sample.name, number(mean) .. ' ' .. string.format('%d', samples + 1))
  end
  redis.call('EXPIRE', key, message.kept_seconds)
end

local known = {}
for node = 1, #KEYS do
  known[node] = redis.call('HGETALL', KEYS[node])
end
return known
