"""`pilotlight webhooks`: what signs them, and those that could not be delivered."""

from __future__ import annotations

from typing import Annotated

import typer

from pilotlight.cli.output import EndpointArgument, JsonOption, connect, note, print_json, print_table, write
from pilotlight.cli.root import help_text, new_app
from pilotlight.cli.targets import find_id

app = new_app()

WebhookArgument = Annotated[
    str, typer.Argument(metavar="ID", help="Id of a dead letter (`pilotlight webhooks dead`).")
]


@app.callback(no_args_is_help=True, help="Show what signs webhooks, and deal with undelivered ones.")
def group() -> None:
    """Show what signs webhooks, and deal with undelivered ones."""


def secret_command(endpoint: EndpointArgument, as_json: JsonOption = False) -> None:
    """Show the secret that signs an endpoint's webhooks.

    The secret alone goes to standard output. Receivers check the header X-Webhook-Signature with it.

    Examples:
      pilotlight webhooks secret qwen
    """
    with connect() as client:
        answer = client.webhook_secret(find_id(client, endpoint))
    if as_json:
        print_json(answer)
    else:
        write(f"{answer['secret']}\n")


def dead_command(
    endpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[ENDPOINT]", help="Id or name of an endpoint; without it, all.", show_default=False
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Show at most this many.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List webhooks that could not be delivered, newest first.

    Examples:
      pilotlight webhooks dead
      pilotlight webhooks dead qwen --json
    """
    with connect() as client:
        endpoint_id = None if endpoint is None else find_id(client, endpoint)
        dead = client.dead_webhooks(endpoint_id=endpoint_id, limit=limit)
    if as_json:
        print_json(dead)
        return
    print_table(
        ["ID", "ENDPOINT", "URL", ">TRIES", ">STATUS", "ERROR", "CREATED"],
        [
            [
                one.get("id"),
                one.get("endpoint_id"),
                one.get("url"),
                one.get("tries"),
                one.get("last_status"),
                one.get("last_error"),
                one.get("created_at"),
            ]
            for one in dead
        ],
    )


def resend_command(webhook: WebhookArgument, as_json: JsonOption = False) -> None:
    """Send a dead letter again, now, with all its tries and the same id.

    Examples:
      pilotlight webhooks resend 4f6e….1
    """
    with connect() as client:
        answer = client.resend_webhook(webhook)
    if as_json:
        print_json(answer)
    else:
        note(f"sending {answer.get('id')} to {answer.get('url')}")


def remove_command(webhook: WebhookArgument, as_json: JsonOption = False) -> None:
    """Forget a dead letter.

    Examples:
      pilotlight webhooks rm 4f6e….1
    """
    with connect() as client:
        client.delete_webhook(webhook)
    if as_json:
        print_json({"id": webhook, "deleted": True})
    else:
        note(f"forgot {webhook}")


for _name, _function in (
    ("secret", secret_command),
    ("dead", dead_command),
    ("resend", resend_command),
    ("rm", remove_command),
):
    app.command(_name, help=help_text(_function))(_function)
