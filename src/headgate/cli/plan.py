"""`headgate plan`: what a workload costs a month on each model, and which policy holds it under a target."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated

import typer

from headgate.cli import inputs, output, stores
from headgate.cli.errors import CommandError, Exit
from headgate.cli.family import AsJson, family
from headgate.cli.prices import AsText, known_model, text_of
from headgate.cli.replay import share
from headgate.policy import workload
from headgate.policy.workload import InvalidWorkload, ModelPlan, Priced, Workload
from headgate.wire.catalog import packaged

app = family("What a workload costs.")


def main(name: str, arguments: Sequence[str]) -> None:
    """Run `headgate plan …`."""
    app(list(arguments), prog_name=f"headgate {name}")


@app.command()
def plan(
    requests_per_day: Annotated[int, typer.Option(metavar="N", help="Requests a day.")],
    system_tokens: Annotated[int, typer.Option(metavar="N", help="Of the prompt that all share.")] = 0,
    question_tokens: Annotated[int, typer.Option(metavar="N", help="Of what a person asks.")] = 300,
    answer_tokens: Annotated[int, typer.Option(metavar="N", help="Of an answer.")] = 250,
    conversation_turns: Annotated[int, typer.Option(metavar="N", help="Questions in a conversation.")] = 1,
    turn_gap: Annotated[str, typer.Option(metavar="60s", help="Between two questions of a conversation.")] = "60s",
    target_usd_month: Annotated[str, typer.Option(metavar="USD", help="What it may cost a month.")] = "200",
    hit_rate: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Of the cache; by the arrivals, when left out.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="SHARE", help="Part that nobody waits for.")] = "30%",
    reuse: Annotated[str, typer.Option(metavar="SHARE", help="Part that was asked before, word for word.")] = "20%",
    shorter: Annotated[str, typer.Option(metavar="SHARE", help="By how much answers could be shorter.")] = "40%",
    peak_factor: Annotated[str, typer.Option(metavar="X", help="The busiest minute, in mean ones.")] = "10",
    counted_on: Annotated[
        str | None, typer.Option(metavar="M", help="The model the tokens are counted on; the settings' default.")
    ] = None,
    text: AsText = "english",
    as_json: AsJson = False,
) -> None:
    """What a workload costs a month on each model, and which policy holds it under a target."""
    catalog = packaged()
    counted = known_model(catalog, counted_on or stores.settings().default_model)
    asked = Workload(
        requests_per_day=requests_per_day,
        system_tokens=system_tokens,
        question_tokens=question_tokens,
        answer_tokens=answer_tokens,
        counted_on=counted,
        conversation_turns=conversation_turns,
        turn_gap_s=inputs.span_ns(turn_gap) // 10**9,
        hit_rate=None if hit_rate is None else share("--hit-rate", hit_rate),
        peak_factor=_factor(peak_factor),
        text=text_of(text),
    )
    target_nanousd = inputs.nanousd(target_usd_month)
    try:
        policies = workload.levers(
            batch_share=share("--batch", batch),
            reuse_share=share("--reuse", reuse),
            answer_share=1 - share("--shorter", shorter),
        )
        plans = workload.plan(asked, policies, catalog, at_ns=time.time_ns(), target_nanousd=target_nanousd)
    except InvalidWorkload as error:
        raise CommandError(Exit.USAGE, f"{error}.") from None
    held = workload.holding(plans, target_nanousd)
    if as_json:
        output.print_json(_json(asked, plans, held, target_nanousd))
        return
    _print(asked, plans, held, target_nanousd)


def verdict(plans: Sequence[ModelPlan], held: Sequence[tuple[str, Priced]], target_nanousd: int) -> str:
    """What holds the target, or that nothing does and how far the nearest is."""
    target = output.usd(target_nanousd)
    if held:
        model, priced = held[0]
        return (
            f"{model} with {priced.levers.label} holds it under {target}: {output.usd(priced.month_nanousd)} a month."
        )
    nearest, cheapest = min(
        ((one.model, priced) for one in plans if one.fits for priced in one.prices),
        key=lambda pair: pair[1].month_nanousd,
        default=("", None),
    )
    if cheapest is None:
        return "No model takes a prompt that long."
    return (
        f"Nothing here holds it under {target} a month. The nearest is {nearest} with {cheapest.levers.label}: "
        f"{output.usd(cheapest.month_nanousd)}, {cheapest.month_nanousd / target_nanousd:.1f} times the target."
    )


def _factor(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"--peak-factor: {text!r} is no number") from None


def _assumptions(asked: Workload) -> list[str]:
    return [
        f"tokens are counted on {asked.counted_on.id} and converted for the other tokenizer as {asked.text} text",
        "a month is 30 days; requests come at random, at one rate all day, and share one system prompt",
        f"the busiest minute is {float(asked.peak_factor):g} times the mean one",
        *(
            [f"{asked.conversation_turns} questions a conversation, {asked.turn_gap_s} s apart"]
            if asked.conversation_turns > 1
            else []
        ),
    ]


def _print(
    asked: Workload, plans: Sequence[ModelPlan], held: Sequence[tuple[str, Priced]], target_nanousd: int
) -> None:
    print("\n".join(f"- {line}" for line in _assumptions(asked)) + "\n")
    # Of the two TTLs the cheaper is shown; --json has both.
    labels = [priced.levers.label for priced in plans[0].prices] if plans else []
    wide = [at for at, label in enumerate(labels) if not label.startswith("1h")]
    output.print_table(
        ("a month on", *(f"{labels[at].removeprefix('5m ')}>" for at in wide), "answers up to>", "requests a day>"),
        [
            (
                one.model if one.fits else f"{one.model} (too long)",
                *(output.usd(_cheaper(one, at)) for at in wide),
                "none" if one.answer_tokens_max is None else f"{one.answer_tokens_max:,}",
                f"{one.requests_per_day_max:,}",
            )
            for one in plans
        ],
    )
    print(
        f"\nThe last two columns: the longest answers, or the most requests, that caching alone holds under "
        f"{output.usd(target_nanousd)} a month.\n{verdict(plans, held, target_nanousd)}\n"
    )
    output.print_table(
        ("at the peak", "requests/min>", "input/min>", "output/min>", "needs"),
        [
            (
                one.model,
                f"{one.needs.rpm:,}",
                f"{one.needs.itpm:,}",
                f"{one.needs.otpm:,}",
                one.needs.tier or "more than any tier",
            )
            for one in plans
        ],
    )


def _cheaper(one: ModelPlan, at: int) -> int:
    """Of a policy and the same one with the other TTL."""
    used = one.prices[at].levers
    same = [
        priced.month_nanousd
        for priced in one.prices
        if (priced.levers.caching == "off") == (used.caching == "off")
        and (priced.levers.batch_share, priced.levers.reuse_share, priced.levers.answer_share)
        == (used.batch_share, used.reuse_share, used.answer_share)
    ]
    return min(same)


def _json(
    asked: Workload, plans: Sequence[ModelPlan], held: Sequence[tuple[str, Priced]], target_nanousd: int
) -> dict[str, object]:
    return {
        "assumptions": _assumptions(asked),
        "target_nanousd": target_nanousd,
        "verdict": verdict(plans, held, target_nanousd),
        "holding": [{"model": model, **_priced_json(priced)} for model, priced in held],
        "models": [
            {
                "model": one.model,
                "tokens_ratio": round(float(one.tokens_ratio), 4),
                "fits": one.fits,
                "caches": one.caches,
                "prices": [_priced_json(priced) for priced in one.prices],
                "needs": {
                    "rpm": one.needs.rpm,
                    "itpm": one.needs.itpm,
                    "otpm": one.needs.otpm,
                    "tier": one.needs.tier,
                },
                "answer_tokens_max": one.answer_tokens_max,
                "requests_per_day_max": one.requests_per_day_max,
            }
            for one in plans
        ],
    }


def _priced_json(priced: Priced) -> dict[str, object]:
    used = priced.levers
    return {
        "policy": used.label,
        "caching": used.caching,
        "batch_share": float(used.batch_share),
        "reuse_share": float(used.reuse_share),
        "answer_share": float(used.answer_share),
        "month_nanousd": priced.month_nanousd,
    }
