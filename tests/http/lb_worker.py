"""A load-balancing worker that joins each connection to the scripted engine in the test's process."""

import asyncio
import contextlib
import os


async def pass_on(reader, writer):
    """Everything that comes, in pieces as they come, and the end."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def join(reader, writer):
    try:
        onward = await asyncio.open_connection("127.0.0.1", int(os.environ["TARGET"]), limit=65536)
    except OSError:
        writer.close()
        return
    await asyncio.gather(pass_on(reader, onward[1]), pass_on(onward[0], writer))


async def main():
    server = await asyncio.start_server(join, "127.0.0.1", int(os.environ["PORT"]), limit=65536)
    await server.serve_forever()


asyncio.run(main())
