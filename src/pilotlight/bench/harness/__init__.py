"""Load generators and stand-ins, each a program of its own, so that none of them runs in what is measured.

`upstream` answers like an engine that needs no time. `streams` opens many streams and checks every event.
`first_token` sends one request at a time by several roads in turn, `rate` on a fixed schedule. `varied` sends
requests as unlike each other as those of real clients. `tokens` asks a real engine for a fixed number of
tokens on many streams, `shared_prefix` for answers to prompts with common beginnings. `fair_share` is a
greedy key among light ones. All speak HTTP/1.1 over raw sockets with httptools (`wire`), print one JSON
object, and take the API key from the environment variable KEY.
"""
