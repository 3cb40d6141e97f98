"""Runs in PostgreSQL, through whichever DB-API 2.0 driver there is (psycopg, psycopg2, pg8000 ...).

    import psycopg
    from postgres_store import PostgresStore

    store = PostgresStore(lambda: psycopg.connect("dbname=runs"), paramstyle=psycopg.paramstyle)
    WorkflowExecutor(workflow, inputs, store=store).run()

Many machines may use one database; their clocks should agree to a few seconds, as a lease lasts 30.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from typing import Any, Callable

from llm_orchestrator import OrchestratorError, Store

_MARKS: dict[str, Callable[[int], str]] = {
    "qmark": lambda number: "?",
    "numeric": lambda number: f":{number}",
    "format": lambda number: "%s",
    "pyformat": lambda number: "%s",  # with a sequence of parameters it is the same
}


class PostgresStore(Store):
    """`connect` makes a new connection; `paramstyle` is the driver's (its module attribute of that name)."""

    def __init__(self, connect: Callable[[], Any], paramstyle: str = "format") -> None:
        if paramstyle not in _MARKS:
            raise OrchestratorError(f"paramstyle must be one of {', '.join(_MARKS)}, not {paramstyle!r}")
        self.open, self.mark = connect, _MARKS[paramstyle]
        super().__init__("the PostgreSQL store")

    def statement(self, sql: str) -> str:
        numbers = itertools.count(1)
        return re.sub(r"\?", lambda _: self.mark(next(numbers)), sql)

    def begin_transaction(self, cursor: Any, write: bool) -> None:
        """These drivers begin one by themselves."""

    def explain(self, error: Exception) -> str:
        """Not every driver says whether its connection was lost: after an error, the next transaction makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()
        return str(error)

    def connect(self) -> Any:
        """A connection to a database that has the tables. Of two processes that make them at once, one fails."""
        connection = self.open()
        cursor = connection.cursor()
        cursor.execute("CREATE TABLE IF NOT EXISTS llm_orchestrator_version (version INTEGER)")
        cursor.execute("SELECT MAX(version) FROM llm_orchestrator_version")
        version = cursor.fetchone()[0] or 0
        if version > len(self.SCHEMA):
            connection.close()
            raise OrchestratorError(f"{self.name} is of a newer version ({version}); this one knows {len(self.SCHEMA)}")
        for number, script in enumerate(self.SCHEMA[version:], version + 1):
            for sql in script.split(";"):
                cursor.execute(sql)
            cursor.execute(self.statement("INSERT INTO llm_orchestrator_version VALUES (?)"), (number,))
        connection.commit()
        return connection
