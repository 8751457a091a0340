"""The HTTP face: data path, job API, worker protocol. `gateway.app` puts them together."""
