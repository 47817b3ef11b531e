"""`sagl push`: upload a network to the Hugging Face Hub, with a model card made from its run."""

from pathlib import Path
from tempfile import TemporaryDirectory

from sagl.configuration.parser import Parser
from sagl.errors import require
from sagl.models.hub_files import HUB_PREFIX, hub_errors, is_reachable, require_repository
from sagl.utils.files import require_unused


def push_parser() -> Parser:
    """Build the parser of `sagl push`."""
    p = Parser("push", "Upload a network to the Hugging Face Hub, with a model card made from its run.")
    p.add_argument("run", type=str, help="Folder of sagl sample or sagl fit, a weight file, or a name.")
    p.add_argument("repository", type=str, help="OWNER/NAME on the Hub; created if there is none.")
    p.add_argument("--licence", type=str, required=True, help="Licence of the weights: mit, apache-2.0, cc-by-4.0, ….")
    p.add_argument("--weights", type=str, default="ema", help="Weights of a .ckpt: ema, ema:DECAY or raw.")
    p.add_argument("--private", action="store_true", help="Create a private repository.")
    p.add_argument("--output", type=str, default=None, help="New folder for the files; nothing is uploaded then.")
    return p


def main(arguments: list[str]) -> None:
    """Run `sagl push RUN_OR_FILE OWNER/NAME --licence ID [--private] [--output DIR]`.

    Raises:
        UserError: the network cannot be read, or the repository not be written.
    """
    args = push_parser().parse(arguments)
    require(bool(args.licence.strip()), "`licence` must be that of the weights, such as mit, got nothing.")
    require_repository(args.repository, "repository")
    if args.output is not None:
        require_unused(Path(args.output), "output")
    with hub_errors(args.repository, "repository"):
        import huggingface_hub

        from sagl.evaluation.hub_folder import write_hub_folder

        options = {"licence": args.licence, "weights": args.weights}
        if args.output is not None:
            write_hub_folder(Path(args.output), args.run, args.repository, **options)
            print(f"{args.output}: the files of {args.repository}. Nothing was uploaded.")
            return
        require(is_reachable(), f"`repository` {args.repository} needs the Hub, which does not answer. See `output`.")
        with TemporaryDirectory() as name:
            write_hub_folder(Path(name), args.run, args.repository, **options)
            api = huggingface_hub.HfApi()
            api.create_repo(args.repository, private=args.private or None, exist_ok=True)
            api.upload_folder(repo_id=args.repository, folder_path=name, commit_message="Upload with sagl push")
    print(f"{args.repository} is on the Hub: sagl sample --model {HUB_PREFIX}{args.repository}")
