"""The command line: ``env``, ``plan``, ``recipes``, ``score``, ``report``, ``push``, services."""

from __future__ import annotations

import ast
import json
import shutil
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from trl_grpo_ext import __version__

if TYPE_CHECKING:
    from trl_grpo_ext.environment import Environment

RECIPE_PATTERNS = ("*.py", "configs/*.yaml", "accelerate/*.yaml")

app = typer.Typer(
    name="trl-grpo-ext",
    help="GRPO for TRL, extended.",
    no_args_is_help=True,
    add_completion=False,
)
recipes_app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


@app.callback(invoke_without_command=True)
def main(
    *, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    """GRPO for TRL, extended."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def env(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, and what is usable here and why not.

    The exit code is 1 where the trainer does not work with the installed TRL.
    """
    from trl_grpo_ext.environment import inspect_environment

    environment = inspect_environment()
    if as_json:
        typer.echo(json.dumps(asdict(environment), indent=2))
    else:
        _print_environment(environment, Console())
    raise typer.Exit(0 if environment.trainer_usable else 1)


def _print_environment(environment: Environment, console: Console) -> None:
    versions = _table("Versions", "package", "version")
    for package, found in environment.versions.items():
        versions.add_row(package, found or "[dim]not installed[/dim]")
    devices = _table("Devices", "device", "what", "bf16")
    for device in environment.devices:
        devices.add_row(device.name, device.description, _BF16[device.bf16])
    features = _table("Usable here", "feature", "", "why")
    for feature in environment.features:
        mark = "[green]yes[/green]" if feature.usable else "[red]no[/red]"
        features.add_row(feature.name, mark, feature.detail.replace("[", r"\["))
    console.print(versions, devices, features)


_BF16 = {True: "yes", False: "no", None: "unknown"}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@app.command()
def plan(
    *,
    model: Annotated[
        str, typer.Option(help="A folder, a config.json, a known name, or a name on the Hub.")
    ],
    gpus: Annotated[int, typer.Option(help="GPUs, one process each.")] = 1,
    gpu_memory_gb: Annotated[float, typer.Option(help="Of one GPU, in GB of 1e9 bytes.")] = 80.0,
    host_memory_gb: Annotated[
        float | None, typer.Option(help="Of the machine, in GB; enough, if not given.")
    ] = None,
    reserve: Annotated[float, typer.Option(help="Share of a GPU to leave free.")] = 0.1,
    dtype: Annotated[
        str, typer.Option(help="mixed (float32 weights, bfloat16 compute), bfloat16, float32.")
    ] = "mixed",
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw_8bit, paged_adamw_8bit, sgd.")
    ] = "adamw",
    sharding: Annotated[str, typer.Option(help="none, zero1, zero2, zero3, fsdp.")] = "none",
    lora: Annotated[int, typer.Option(help="Rank of an adapter; 0 trains all weights.")] = 0,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Compute layers again for the backward pass.")
    ] = True,
    micro_batch: Annotated[int, typer.Option(help="Completions a GPU in one pass.")] = 8,
    gradient_accumulation: Annotated[
        int | None, typer.Option(help="Micro-batches a step; one group a GPU if not given.")
    ] = None,
    num_generations: Annotated[int, typer.Option(help="Completions of a prompt.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Of the longest prompt.")] = 512,
    completion_tokens: Annotated[int, typer.Option(help="Most, of a completion.")] = 1024,
    reference: Annotated[
        str, typer.Option(help="auto, none, adapter, resident, streamed, quantized.")
    ] = "auto",
    reference_quantization: Annotated[str, typer.Option(help="nf4, fp4, int8.")] = "nf4",
    reference_block_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    reference_double_quantization: Annotated[
        bool, typer.Option(help="Store scales in 8 bits.")
    ] = True,
    reference_rank: Annotated[
        int | None,
        typer.Option(
            help="Of low-rank factors. By default 0 for 8 bits; for 4 bits 32, whose bytes go into "
            "layers in 8 bits."
        ),
    ] = None,
    reference_bits: Annotated[
        float | None,
        typer.Option(help="That a quantized weight takes in the mean, instead of the rank."),
    ] = None,
    reference_embedding_bits: Annotated[
        int, typer.Option(help="8, or 16 for those of the policy.")
    ] = 16,
    reward: Annotated[
        str, typer.Option(help="none, api, model (of the policy's size), or a name or size.")
    ] = "none",
    ppo: Annotated[bool, typer.Option("--ppo", help="Count a value model too.")] = False,
    shared_prefix: Annotated[
        bool, typer.Option("--shared-prefix", help="Count each prompt once a group.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Save a picture of it, such as a .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the memory that a run needs on each GPU, and settings that fit.

    Nothing but the model's configuration is read, and no weight is fetched.
    """
    given = dict(locals())
    run = ("gpu_memory_gb", "host_memory_gb", "reserve", "plot", "as_json")
    settings = {name: value for name, value in given.items() if name not in run}
    memory = {name: given[name] for name in run[:3]}
    from trl_grpo_ext.errors import ExtGRPOError
    from trl_grpo_ext.memory.options import settings_of
    from trl_grpo_ext.memory.plan import make_plan
    from trl_grpo_ext.memory.show import print_plan, save_plot

    try:
        planned = make_plan(
            model, settings_of(**settings), **memory, choose_reference=reference == "auto"
        )
    except ExtGRPOError as error:
        raise _failure(str(error)) from error
    if plot is not None:
        try:
            save_plot(planned, plot)
        except (OSError, ValueError) as error:  # no such folder; a format that is not known
            raise _failure(
                f"{plot} could not be written: {error}. Name a .png, .pdf or .svg in a folder "
                "that exists."
            ) from error
    if as_json:
        typer.echo(json.dumps(planned.to_dict(), indent=2))
    else:
        print_plan(planned, Console())


@recipes_app.command("list")
def list_recipes() -> None:
    """List the recipes and the configurations that come with them."""
    folder = recipes_folder()
    table = _table("Recipes", "file", "what it does")
    for path in recipe_files(folder):
        table.add_row(path.as_posix(), _summary(folder / path).replace("[", r"\["))
    Console().print(table)


@recipes_app.command("copy")
def copy_recipes(
    target: Annotated[
        Path, typer.Argument(metavar="DIR", file_okay=False, help="Folder to copy them into.")
    ],
    *,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files in DIR.")] = False,
) -> None:
    """Copy the recipes and their configurations into a folder, to run and to change."""
    folder = recipes_folder()
    files = recipe_files(folder)
    if not force and (present := [path for path in files if (target / path).exists()]):
        names = ", ".join(path.as_posix() for path in present)
        raise _failure(
            f"{target} already has {names}, which copying would overwrite with the recipes of "
            f"trl-grpo-ext {__version__}. Choose another folder, or overwrite with --force."
        )
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, target / path)
    typer.echo(f"Copied {len(files)} files to {target}. To start the quickstart:\n")
    typer.echo(
        f"  accelerate launch {target / 'grpo.py'} --config {target / 'configs/quickstart.yaml'}"
    )


def recipes_folder() -> Path:
    """Return where the recipes are: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    for folder in (package / "_recipes", package.parent / "recipes"):
        if (folder / "configs").is_dir():
            return folder
    raise _failure(
        f"no recipes beside {package}, so this installation is incomplete. "
        "Install again with pip install --force-reinstall --no-deps trl-grpo-ext."
    )


def recipe_files(folder: Path) -> list[Path]:
    """Return the recipes, then their configurations, relative to the folder that holds them."""
    return [
        path.relative_to(folder)
        for pattern in RECIPE_PATTERNS
        for path in sorted(folder.glob(pattern))
    ]


@app.command("check-reward")
def check_reward_command(
    *,
    config: Annotated[
        Path | None, typer.Option(help="YAML of a recipe.", exists=True, dir_okay=False)
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Or the address of a service, with --protocol.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Of the service: openai_chat, openrlhf, generic_json, ...")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the protocol, as name=value, such as model=judge; repeat for more."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key, never the key.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Of the samples, for one of your own.")] = None,
    completion: Annotated[
        list[str] | None, typer.Option(help="A sample of your own; repeat for more.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Of the sample row, as name=value, such as answer=4; repeat for more."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a reward service, or each of a YAML, about two samples, and show what it says.

    The exit code is 1 where something keeps it from giving scores.
    """
    from trl_grpo_ext.errors import ExtGRPOError
    from trl_grpo_ext.rewards.api.check import check_reward, shown
    from trl_grpo_ext.rewards.api.check_arguments import rewards_to_check, samples_to_check

    try:
        samples = samples_to_check(prompt=prompt, completion=completion, column=column)
        rewards = rewards_to_check(
            config=config,
            base_url=base_url,
            protocol=protocol,
            option=option,
            api_key_env=api_key_env,
        )
        found = [(r.__name__, one) for r in rewards for one in check_reward(r, **samples)]
    except ExtGRPOError as error:
        raise _failure(str(error)) from error
    if as_json:
        typer.echo(json.dumps([{"reward": name, **asdict(one)} for name, one in found], indent=2))
    else:
        typer.echo("\n".join(shown(one, name=name) for name, one in found))
    raise typer.Exit(1 if any(one.problem for _, one in found) else 0)


@app.command("serve-reward")
def serve_reward_command(
    *,
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub name of a classification model.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="Or a reward: built-in name, or import path, which runs it.")
    ] = None,
    reward_arguments: Annotated[
        str, typer.Option(help="Keyword arguments of the reward, a JSON object.")
    ] = "{}",
    name: Annotated[str | None, typer.Option(help="Under which clients know it.")] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token clients must send.")
    ] = None,
    label: Annotated[
        int | None, typer.Option(help="Index of the logit that is the reward, if there are more.")
    ] = None,
    label_column: Annotated[
        str, typer.Option(help="What a reward function calls the labels.")
    ] = "answer",
    pad_token: Annotated[
        str | None, typer.Option(help="For a model that names none, a token it knows.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(help="Of one text; the model's own limit if not given.")
    ] = None,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Of one forward pass, padding included.")
    ] = 16384,
    max_padding: Annotated[float, typer.Option(help="Share of padding in a pass.")] = 0.25,
    max_wait_ms: Annotated[float, typer.Option(help="For other requests to share a pass.")] = 5.0,
    grace_s: Annotated[int, typer.Option(help="For requests in flight when stopped.")] = 30,
) -> None:
    """Serve a reward model or function over HTTP, for many trainers."""
    given = dict(locals())
    from trl_grpo_ext.errors import ExtGRPOError
    from trl_grpo_ext.rewards.serve.settings import settings_of
    from trl_grpo_ext.rewards.serve.start import serve_reward

    try:
        serve_reward(settings_of(**given))
    except ExtGRPOError as error:
        raise _failure(str(error)) from error


@app.command("score")
def score_command(
    *,
    data: Annotated[
        Path, typer.Option(help="Completions to score: .jsonl, .json, .csv or .parquet.")
    ],
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Built-in name, or import path, which runs it; repeat for more."),
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Option(help="Of the reward at the same place, a JSON object; repeat for more."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Or the rewards of a recipe's YAML.", dir_okay=False)
    ] = None,
    prompt_column: Annotated[str, typer.Option(help="With the prompts.")] = "prompt",
    completion_column: Annotated[
        str | None,
        typer.Option(help="With a completion a row or a list of them; completion or completions."),
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option(help="Passed to the rewards as answer, as in a recipe.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub name, for rewards that count tokens.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Best and worst ones to show.", min=0)] = 5,
    output: Annotated[Path | None, typer.Option(help="Write the rows with their scores.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Save the histogram, such as a .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score completions in a file, and show how a reward judges before it trains a model."""
    from trl_grpo_ext.errors import ExtGRPOError
    from trl_grpo_ext.rewards.score_arguments import rewards_to_score, tokens_by
    from trl_grpo_ext.rewards.score_file import read_completions, score_completions, with_scores
    from trl_grpo_ext.rewards.score_rows import check_output, read_rows, write_rows
    from trl_grpo_ext.rewards.score_show import check_plot, print_scores, save_plot

    try:
        rewards = rewards_to_score(reward=reward or (), arguments=arguments or (), config=config)
        check_output(output, data=data)
        check_plot(plot)
        found = read_completions(
            read_rows(data),
            prompt_column=prompt_column,
            completion_column=completion_column,
            answer_column=answer_column,
        )
        token_ids = tokens_by(tokenizer)
        scored = [score_completions(one, found, token_ids=token_ids) for one in rewards]
        if output is not None:
            write_rows(output, with_scores(found, scored))
    except ExtGRPOError as error:
        raise _failure(str(error)) from error
    if plot is not None:
        save_plot(scored, plot)
    if as_json:
        typer.echo(json.dumps([one.summary() for one in scored], indent=2))
    else:
        print_scores(scored, found, Console(), num_examples=examples)


@app.command("report")
def report_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_FOLDER...", help="The output_dir of each run.")
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option(help="RUN_FOLDER/report.html, or comparison.html for several, by default."),
    ] = None,
    max_completions: Annotated[
        int, typer.Option(help="Most to show, at evenly spaced steps; 0 for none.", min=0)
    ] = 2000,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Make one HTML page of a run, or of several side by side, that fetches nothing.

    The exit code is 2 where a folder holds no run, or the page cannot be written.
    """
    from datasets import disable_progress_bars

    from trl_grpo_ext.errors import ExtGRPOError
    from trl_grpo_ext.report.web import write_web_report

    disable_progress_bars()  # a bar a file
    try:
        page = write_web_report(folders, output=output, max_completions=max_completions)
    except ExtGRPOError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)")
    if open_it:
        webbrowser.open(page.resolve().as_uri())


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="Of a run, or of a dataset.")],
    *,
    repo_id: Annotated[
        str | None, typer.Option(help="OWNER/NAME: all of the folder, to this repository.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Create the repository public; private otherwise.")
    ] = False,
) -> None:
    """Upload what a run could not upload, or a folder as it is, to the Hub."""
    from trl_grpo_ext.errors import HubError
    from trl_grpo_ext.hub.push import push_folder

    try:
        done = push_folder(folder, repo_id=repo_id, public=public)
    except HubError as error:
        raise _failure(str(error)) from error
    typer.echo("\n".join(done) or "Nothing is missing on the Hub. All anew: --repo-id OWNER/NAME.")


def _summary(path: Path) -> str:
    """First line of a recipe's docstring, or of the comment that opens a YAML file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _failure(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)


if __name__ == "__main__":
    app()
