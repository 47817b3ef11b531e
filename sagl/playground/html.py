"""Pictures of the page as HTML: PNG files inside the text, enlarged by nearest neighbours."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

import torch
from torch import Tensor

from sagl.playground.rows import Frame, Row
from sagl.playground.steps import attention_received
from sagl.sampling.batch import encode_pngs
from sagl.sampling.exports import colorize_masks
from sagl.sampling.run_folder import decode_png
from sagl.utils.images import noise_to_uint8

MAX_ATTENTION = 3.0
"""Attention received, whose mean is 1, that is drawn white."""
CSS = """
.columns {display: grid !important; grid-template-columns: minmax(300px, 2fr) minmax(0, 5fr);
    grid-template-rows: auto 1fr; align-items: start;}
.columns > * {min-width: 0 !important; width: 100%;}
.columns > .settings {grid-row: 1 / span 2;}
.image-row {display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 8px;}
.image-row figure {margin: 0; width: clamp(70px, calc(25% - 5px), 160px);}
#step figure {width: clamp(70px, calc(25% - 5px), 128px);}
.image-row img, .image-row .blank {width: 100%; aspect-ratio: 1; border-radius: 3px; display: block;}
.image-row img {image-rendering: pixelated;}
.image-row .blank {background: var(--border-color-primary);}
.image-row figcaption {font-size: 13px; line-height: 1.3; color: var(--body-text-color-subdued);}
.row-title {margin: 0 0 4px; font-size: 15px; font-weight: 600;}
.row-title small {font-size: 13px; font-weight: 400; color: var(--body-text-color-subdued);}
.html-container {padding: 0 !important;}
.buttons button {min-width: 0; padding: 8px 4px; font-size: 15px;}
.status {margin: 0; min-height: 24px; font-size: 15px;}
.refused {padding: 8px 12px; border-left: 4px solid #dc2626; background: var(--background-fill-secondary);}
.downloads a {margin-right: 16px; text-decoration: underline;}
@media (max-width: 760px) {
    .columns {display: flex !important; flex-direction: column;}
    .columns > .results {order: -1;}
    .gradio-container main {padding: 10px !important;}
    .buttons {flex-wrap: nowrap !important; gap: 6px;}
}
"""


def figure(png: bytes | None, description: str, caption: str = "") -> str:
    """Return one image; None stands for one that is not there yet."""
    source = "" if png is None else base64.b64encode(png).decode()
    image = (
        f'<img src="data:image/png;base64,{source}" alt="{escape(description)}">'
        if png
        else '<div class="blank"></div>'
    )
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>"


def image_row(title: str, note: str, figures: Sequence[str]) -> str:
    """Return a row of images below its title."""
    heading = f'<p class="row-title">{escape(title)} <small>{escape(note)}</small></p>'
    return f'{heading}<div class="image-row" data-row="{escape(title)}">{"".join(figures)}</div>'


def show_rows(rows: Mapping[str, Row | Frame | None]) -> str:
    """Return rows of images under their titles, each with its masks below."""
    parts = []
    num_images = max(len(row.images) for row in rows.values() if row is not None)
    for title, row in rows.items():
        images: list[bytes | None] = [] if row is None else list(row.images)
        images += [None] * (num_images - len(images))
        captions, note = [""] * num_images, ""
        if isinstance(row, Row):
            captions = [
                f"{i}" if label < 0 else f"{i}, class {label}" for i, label in zip(row.ids, row.labels, strict=True)
            ]
            note = f"{row.nfe:g} evaluations per image, {sum(row.seconds):.1f} s"
        elif isinstance(row, Frame):
            note = f"step {row.steps_done} of {row.num_steps}"
        parts.append(
            image_row(title, note, [figure(png, f"{title} {c}", c) for png, c in zip(images, captions, strict=True)])
        )
        if isinstance(row, Row) and row.masks:
            masks = torch.stack([torch.from_numpy(decode_png(png)[..., 0].copy()) for png in row.masks])[:, None]
            colored = encode_pngs(colorize_masks(masks.float() / 255))
            parts.append(
                image_row(f"Mask of {title}", "brighter: in more steps", [figure(png, "mask") for png in colored])
            )
    return "".join(parts)


def show_step(row: Row, sample_id: int, position: int, site: str) -> str:
    """Return the images of one step of a sample: of the chain, and the attention received at a block by head.

    Raises:
        UserError: another network was loaded since the row was sampled.
    """
    pipeline = row.pipeline
    chain, k = row.find(sample_id)
    record = chain[min(position, len(chain) - 1)]
    timestep = int(pipeline.schedule.timesteps[record.step])
    parts = {
        "xₜ": noise_to_uint8(record.x_t[k])[None],
        "estimate of x₀": noise_to_uint8(record.x0_hat[k])[None],
        "ε": noise_to_uint8(record.eps[k])[None],
    }
    if record.weak_eps is not None:
        difference = (record.eps[k] - record.weak_eps[k]).float().abs().mean(dim=0)
        parts["ε′ (weak)"] = noise_to_uint8(record.weak_eps[k])[None]
        parts["|ε − ε′|"] = colorize_masks((difference / difference.max().clamp_min(1e-6))[None, None])
    if record.mask is not None:
        parts["mask"] = colorize_masks(record.mask[k][None].float())
    label = row.labels[row.ids.index(sample_id)]
    attention = attention_received(pipeline, record.x_t[k][None], record.step, label, site)
    maps = {f"head {head}": values for head, values in enumerate(attention)} | {"mean": attention.mean(dim=0)}
    heads = {name: colorize_masks((values / MAX_ATTENTION)[None, None]) for name, values in maps.items()}
    side = attention.shape[-1]
    return _show_images(f"Step {record.step}", f"timestep {timestep}", parts) + _show_images(
        f"Attention received at {site}", f"{side}×{side} tokens, the mean is 1, white is {MAX_ATTENTION:g}", heads
    )


def _show_images(title: str, note: str, images: Mapping[str, Tensor]) -> str:
    return image_row(title, note, [figure(encode_pngs(image)[0], name, name) for name, image in images.items()])


def show_downloads(keys: Mapping[str, str]) -> str:
    """Return links to the run folders by the names of rows."""
    links = [
        f'<a href="runs/{key}.zip" download="samples.zip">{escape(name)}: samples.zip</a>' for name, key in keys.items()
    ]
    text = "The run folder as sagl sample makes it: run.json, shards and exports."
    return f'<p>{text}</p><p class="downloads">{"".join(links)}</p>'


def show_status(message: str, *, refused: bool = False) -> str:
    """Return the status line; a refusal is announced by screen readers."""
    attributes = 'class="status refused" role="alert"' if refused else 'class="status" role="status"'
    return f"<p {attributes}>{escape(message)}</p>"
