"""`headgate config validate | show`: whether the settings are right, and what they are. Shows no secret."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from headgate.cli import output, stores
from headgate.cli.family import AsJson, family
from headgate.gateway.settings import Settings

app = family("Settings.")


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate config …`."""
    app(list(arguments), prog_name=f"headgate {name}")


@app.command()
def validate(as_json: AsJson = False) -> None:
    """Say whether a start with these settings would be refused, and why."""
    stores.settings()
    if as_json:
        output.print_json({"valid": True})
    else:
        print("The settings are valid.")


@app.command()
def show(as_json: AsJson = False) -> None:
    """Show every setting as it is in force: environment over file over default."""
    values = shown(stores.settings())
    if as_json:
        output.print_json(values)
        return
    output.print_table(("setting", "value"), list(_rows("", values)))


def _rows(name: str, value: Any) -> Iterator[tuple[str, str]]:  # Any: JSON
    """A line for each value that is not itself a table; tables in a list go by their names."""
    if isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        value = {str(inner["name"]): {key: of for key, of in inner.items() if key != "name"} for inner in value}
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _rows(f"{name}.{key}" if name else key, inner)
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) or "–"
    else:
        yield name, "–" if value in (None, "", {}) else str(value)


def shown(settings: Settings) -> dict[str, Any]:
    """The settings as JSON, secrets and passwords masked."""
    values: dict[str, Any] = settings.model_dump(mode="json")
    for name in ("database_url", "redis_url"):
        values[name] = re.sub(r"(?<=:)[^:@/]*(?=@)", "***", values[name])
    return values
