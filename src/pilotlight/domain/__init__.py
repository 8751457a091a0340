"""The nouns of Pilotlight, frozen all of them. No behaviour beyond what follows from the values.

Times are integers: milliseconds since the Unix epoch where a name ends in `_ms` and says a moment
(`created_ms`), a duration in milliseconds where it says one (`idle_timeout_ms`).
"""
