"""Models by name: what they are, what they need, and where their files are.

`catalog` answers what a name means, `cache` what lies on this machine's disks, `hub` fetches from the Hugging
Face hub (`listing` checks what it says, `blobs` has its files, `problems` puts its refusals in our words,
`fetch` runs it in a process of its own), `upkeep` checks and removes, `fit` computes what a worker will take.
The management API calls them when an endpoint is made, the worker program at its start; `ember/` holds the
files of the built-in model.
"""
