-- Queries of one vector table, each with another text; collects what the answers' Server-Timing says.
-- From the environment: API_KEY, TABLE_ID, FILTER (JSON that follows "limit"), MEAN_DELAY_MS (a random pause before each).

local path = "/v1/vector-tables/" .. os.getenv("TABLE_ID") .. "/query"
local filter = os.getenv("FILTER") or ""
local mean_delay = tonumber(os.getenv("MEAN_DELAY_MS") or "0")
local threads = {}

function setup(thread)
   table.insert(threads, thread)
end

function init()
   math.randomseed(os.time())
   wrk.headers["Authorization"] = "Bearer " .. os.getenv("API_KEY")
   wrk.headers["Content-Type"] = "application/json"
   failed, failure = 0, ""
   overheads, catalogs, embeds, searches = {}, {}, {}, {}
end

if mean_delay > 0 then
   function delay()
      return math.random(0, 2 * mean_delay)
   end
end

function request()
   local body = string.format('{"query": "river stone market %d", "limit": 10%s}', math.random(1, 2000000000), filter)
   return wrk.format("POST", path, nil, body)
end

function response(status, headers, body)
   local timing = headers["server-timing"] or headers["Server-Timing"]
   if status ~= 200 or timing == nil then
      failed = failed + 1
      failure = body
      return
   end
   local catalog, embed, search, total = timing:match("catalog;dur=([%d.]+).*embed;dur=([%d.]+).*search;dur=([%d.]+).*total;dur=([%d.]+)")
   table.insert(overheads, total - embed - search)
   table.insert(catalogs, tonumber(catalog))
   table.insert(embeds, tonumber(embed))
   table.insert(searches, tonumber(search))
end

local function percentiles(name)
   local all = {}
   for _, thread in ipairs(threads) do
      for _, value in ipairs(thread:get(name)) do
         table.insert(all, value)
      end
   end
   table.sort(all)
   local function at(fraction)
      return all[math.max(1, math.ceil(#all * fraction))] or -1
   end
   return string.format('"%s": {"p50": %.3f, "p95": %.3f, "p99": %.3f}', name, at(0.5), at(0.95), at(0.99))
end

function done(summary, latency, requests)
   local count = 0
   for _, thread in ipairs(threads) do
      count = count + thread:get("failed")
      if thread:get("failed") > 0 then
         io.stderr:write(thread:get("failure"), "\n")
      end
   end
   print(string.format(
      'RESULT {"requests": %d, "seconds": %.3f, "failed": %d, "latency": {"p50": %.3f, "p95": %.3f}, %s, %s, %s, %s}',
      summary.requests, summary.duration / 1e6, count, latency:percentile(50) / 1000, latency:percentile(95) / 1000,
      percentiles("overheads"), percentiles("catalogs"), percentiles("embeds"), percentiles("searches")))
end
