"""The store of several machines: a PostgreSQL database that any number of gateways share.

`store` is the port's face, `registry` its half that is not the queue; `database` runs transactions and says
what became of them; `group` gathers changes into one commit; `changes` applies events to locked jobs; `news`
is what gateways tell each other, `lead` which one of them leads; `migrate` brings the schema up to date; the
other modules are the operations, plain functions on a transaction, with their SQL in `queries/*.sql`.
"""

from __future__ import annotations

from pilotlight.stores.postgresql.store import PostgresqlStore, open_postgresql_store

__all__ = ["PostgresqlStore", "open_postgresql_store"]
