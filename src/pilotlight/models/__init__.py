"""Models by name: what they are, what they need, and where their files are.

`catalog` answers what a name means, `hub` fetches weights from the Hugging Face hub, `fit` computes what
a worker will take. The management API calls all three when an endpoint is made; `ember/` holds the files
of the built-in model.
"""
