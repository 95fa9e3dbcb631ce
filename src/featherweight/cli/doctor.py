# SPDX-License-Identifier: Apache-2.0
"""`featherweight doctor`: what this installation and this machine can do."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from featherweight.cli.console import Json, say, table

__all__ = ["command"]


def command(
    extra: Annotated[
        list[str] | None,
        typer.Option("--extra", metavar="NAME", help="Exit with 5 unless this extra is installed; may be repeated."),
    ] = None,
    json: Json = False,
) -> dict[str, Any]:
    """Shows versions, extras, runtimes, what this processor accelerates, and what is missing with its pip command.

    \b
    Example: featherweight doctor --extra onnx
    """
    from featherweight.doctor import diagnose, need

    facts = diagnose()
    if not json:
        _show(facts)
    need(extra or ())
    return facts


def _show(facts: dict[str, Any]) -> None:
    machine = facts["machine"]
    say(f"featherweight {facts['featherweight']}, Python {machine['python']}, {machine['os']}", "bold")
    memory = f", {machine['memory_bytes'] / 1e9:.0f} GB of memory" if machine["memory_bytes"] else ""
    quota = f" (limited to {machine['cpu_quota']} of them)" if machine["cpu_quota"] else ""
    say(f"{machine['cpu']}, {machine['cores']} cores{quota}{memory}, GPU: {machine['gpu'] or 'none'}")
    say()
    say("This processor accelerates", "bold")
    for line in facts["accelerates"]:
        say(f"  {line}")
    say(f"  {facts['zeros']}")
    say()
    rows = [[name, "yes" if found["works"] else "no", found["facts"]] for name, found in facts["runtimes"].items()]
    table(("runtime", "works", ""), rows)
    say()
    table(("extra", "installed", "packages"), [_extra(name, found) for name, found in facts["extras"].items()])
    say()
    say(f"methods: {', '.join(facts['methods'])}")
    where = facts["writable"]
    say(f"{where['folder']} {'can be written' if where['works'] else 'cannot be written: ' + str(where['error'])}")


def _extra(name: str, found: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{package} {version or '(missing)'}" for package, version in found["packages"].items())
    return [
        name,
        "yes" if found["installed"] else "no",
        packages if found["installed"] else f"{packages}. Run: {found['run']}",
    ]
