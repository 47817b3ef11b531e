"""`sagl completion`: completion of verbs and flags for a shell, made from the parsers themselves."""

from importlib import import_module
from typing import Literal

from sagl.commands.parser import Parser
from sagl.commands.verbs import VERBS

SHELLS = Literal["bash", "zsh"]
PARSERS = {
    "sample": ("sagl.commands.request", "sample_parser"),
    "fit": ("sagl.commands.fit", "fit_parser"),
    "validate": ("sagl.commands.validate", "validate_parser"),
    "test": ("sagl.commands.test", "test_parser"),
    "shard": ("sagl.commands.shard", "shard_parser"),
    "evaluate": ("sagl.commands.evaluate", "evaluate_parser"),
    "statistics": ("sagl.commands.statistics", "statistics_parser"),
    "compare": ("sagl.commands.compare", "compare_parser"),
    "convert": ("sagl.commands.convert", "convert_parser"),
    "export": ("sagl.commands.export", "export_parser"),
}
"""Where each verb's flags are."""

BASH = """_sagl() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words="{verbs}" line
    if [ "$COMP_CWORD" -gt 1 ]; then
        case ${{COMP_WORDS[1]}} in
{cases}
            *) words="--help";;
        esac
    fi
    COMPREPLY=()
    while IFS= read -r line; do
        [ -z "$line" ] || COMPREPLY+=("$line")
    done <<< "$(compgen -W "$words" -- "$word"; [ "$COMP_CWORD" -eq 1 ] || compgen -f -- "$word")"
}}
complete -o filenames -F _sagl sagl"""


def completion_parser() -> Parser:
    """The flags."""
    p = Parser("completion", 'Print completion for a shell. In ~/.bashrc: eval "$(sagl completion bash)".')
    p.add_argument("shell", type=SHELLS, help="bash or zsh.")
    return p


def main(arguments: list[str]) -> None:
    """Print: `eval "$(sagl completion bash)"`.

    Raises:
        UserError: another shell.
    """
    shell = completion_parser().parse(arguments).shell
    print(("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script())


def script() -> str:
    """The completion function, for bash and for zsh's bash mode."""
    flags = {verb: _flags(*where) for verb, where in PARSERS.items()}
    flags |= {"completion": ["bash", "zsh"]}
    cases = "\n".join(f'            {verb}) words="{" ".join(words)}";;' for verb, words in flags.items())
    return BASH.format(verbs=" ".join(VERBS), cases=cases)


def _flags(module: str, function: str) -> list[str]:
    parser: Parser = getattr(import_module(module), function)()
    return [option for option in parser.options if option.startswith("--")]
