-- For wrk: a small chat completion, not streamed. KEY comes from the environment.
wrk.method = "POST"
wrk.body = '{"model":"m","messages":[{"role":"user","content":"' .. string.rep("hello ", 50) .. '"}],"max_tokens":200}'
wrk.headers["content-type"] = "application/json"
wrk.headers["authorization"] = "Bearer " .. (os.getenv("KEY") or "none")
