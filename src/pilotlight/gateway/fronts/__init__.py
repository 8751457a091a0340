"""Several processes on one port: fronts that serve the data path, and the owner of the slots they ask.

The owner is a whole gateway but for the port. `owner_side` and `front_side` are the ends of the link between
them, over which go the `messages`; `remote_desk` is how the data path of a front gets its slots.
"""
