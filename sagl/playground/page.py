"""The page of `sagl playground`: settings on the left, images of equal seeds on the right."""

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from sagl.errors import UserError
from sagl.guidance.registry import GUIDANCES
from sagl.playground.controls import Control, Value
from sagl.playground.html import show_downloads, show_rows, show_status, show_step
from sagl.playground.session import Comparison, Playground
from sagl.settings.guidance import TERM_OPTIONS
from sagl.utils.environment import refuse_out_of_memory

SCALE_MAXIMA = {"cfg": 8.0, "classifier": 10.0, "eps_scaling": 0.05}
"""Largest scales of the sliders; those of other methods end at 2."""
QUEUE = {"concurrency_id": "network", "concurrency_limit": 1}
"""Events that use the network run one at a time, in the order of arrival."""
FRAME_SECONDS = 0.15
"""Least time between two frames: a browser that is behind would show a cancelled request for a while."""
SESSION_SECONDS = 3600
"""Time after which the images of a session are forgotten."""


class Page:
    """Components of the page and their events.

    Args:
        playground: what the events do.
    """

    def __init__(self, playground: Playground) -> None:
        self.playground, self.form = playground, playground.form
        self.values = self.form.start_values(self.form.network)
        self.controls: dict[str, Any] = {}
        with gr.Blocks(title="sagl playground", analytics_enabled=False, fill_width=True) as self.blocks:
            self.kept, self.shown = (gr.State(time_to_live=SESSION_SECONDS) for _ in range(2))
            with gr.Row(elem_classes="columns"):
                with gr.Column(elem_classes="settings"):
                    self._add_settings()
                with gr.Column(elem_classes="results"):
                    self._add_results()
                with gr.Column():
                    self._add_details()
            self._connect()

    # -------------------------------------------------------------------------------------------- components

    def _add_settings(self) -> None:
        groups = dict(self.form.groups)
        samples, sampler = groups.pop("samples"), groups.pop("sampler")
        active = [name for name in groups if self.values[f"{name}.scale"]] or ["sag"]
        self.panels = {}
        for name, controls in groups.items():
            with gr.Group(visible=name in active) as self.panels[name]:
                scale, *others = sorted(controls, key=lambda control: not control.name.endswith(".scale"))
                self._add_scale(scale, SCALE_MAXIMA.get(name, 2.0))
                with gr.Accordion(f"more of {name}", open=False):
                    gr.Markdown(GUIDANCES[name].settings_class.__doc__, container=True)
                    self._add_controls(sorted(others, key=lambda control: control.name.split(".")[1] in TERM_OPTIONS))
        self.methods = gr.Dropdown(
            list(groups), value=active, multiselect=True, label="guidance methods", info="Add one, or take one off."
        )
        with gr.Group():
            self.network = gr.Dropdown(
                self.form.networks,
                value=self.form.network,
                label="network",
                info="A name, or the path of a weight file." if self.form.allow_files else "A pretrained network.",
                allow_custom_value=True,
            )
            self._add_controls(samples)
        with gr.Accordion("sampler and steps", open=False):
            self._add_controls(sampler)

    def _add_controls(self, controls: list[Control]) -> None:
        """Add controls in two columns."""
        for first in range(0, len(controls), 2):
            with gr.Row():
                for control in controls[first : first + 2]:
                    self.controls[control.name] = self._component(control)

    def _add_scale(self, control: Control, maximum: float) -> None:
        value = self.values[control.name]
        assert isinstance(value, int | float)
        maximum = max(maximum, value)
        self.controls[control.name] = gr.Slider(
            0,
            maximum,
            value=value,
            step=maximum / 40,
            label=control.name,
            info=control.help,
            elem_id=_element_id(control),
        )

    def _component(self, control: Control) -> Any:  # noqa: ANN401 (a component of gradio)
        options: dict[str, Any] = {
            "label": control.name,
            "info": control.help,
            "value": self.values[control.name],
            "min_width": 140,
            "elem_id": _element_id(control),
        }
        if control.kind == "choice":
            return gr.Dropdown(list(control.choices), **options)
        if control.kind == "checkbox":
            return gr.Checkbox(**options)
        if control.kind == "text":
            return gr.Textbox(max_lines=1, **options)
        return gr.Number(precision=0 if control.kind == "integer" else None, **options)

    def _add_results(self) -> None:
        with gr.Row(elem_classes="buttons"):
            self.sample_button = gr.Button("Sample", variant="primary", min_width=40, elem_id="sample")
            self.cancel_button = gr.Button("Cancel", min_width=40, elem_id="cancel")
            self.keep_button = gr.Button("Keep A", min_width=40, elem_id="keep")
            self.drop_button = gr.Button("Drop A", min_width=40, elem_id="drop")
        self.status = gr.HTML(show_status("Ready."), elem_id="status")
        self.image_rows = gr.HTML(elem_id="rows")

    def _add_details(self) -> None:
        with gr.Tab("Step by step"):
            with gr.Row():
                self.row = gr.Dropdown([], label="images", min_width=110, elem_id="row")
                self.sample_id = gr.Dropdown([], label="id", min_width=80, elem_id="sample_id")
                self.site = gr.Dropdown([], label="attention of block", min_width=110, elem_id="site")
            self.position = gr.Slider(0, 1, value=0, step=1, label="step, from noise to image", elem_id="position")
            self.step = gr.HTML(elem_id="step")
        with gr.Tab("Command and Python"):
            self.command = gr.Code(label="command line", language="shell", interactive=False, elem_id="command")
            self.python = gr.Code(label="Python", language="python", interactive=False, elem_id="python")
        with gr.Tab("Download"):
            self.downloads = gr.HTML("Sample first.", elem_id="downloads")

    # ------------------------------------------------------------------------------------------------ events

    def _connect(self) -> None:
        settings = [self.network, self.methods, self.kept, *self.controls.values()]
        results = [self.status, self.image_rows, self.shown, self.command, self.python, self.downloads]
        results += [self.row, self.sample_id, self.site, self.position]
        view = [self.shown, self.row, self.sample_id, self.position, self.site]
        scales = [control for name, control in self.controls.items() if name.endswith(".scale")]
        texts = [control for control in self.controls.values() if isinstance(control, gr.Number | gr.Textbox)]
        hidden: dict[str, Any] = {"show_progress": "hidden"}
        triggers = [self.blocks.load, self.sample_button.click]
        triggers += [scale.release for scale in scales] + [text.submit for text in texts]
        sampling = gr.on(triggers, self._sample, settings, results, trigger_mode="always_last", **QUEUE, **hidden)
        show = {"fn": self._show_step, "inputs": view, "outputs": [self.step], **QUEUE, **hidden}
        sampling.then(**show)
        gr.on(
            [self.position.input, self.row.input, self.sample_id.input, self.site.input],
            trigger_mode="always_last",
            **show,
        )
        self.keep_button.click(self._keep, settings, [self.kept, self.status], **hidden)
        drop = self.drop_button.click(lambda: None, None, self.kept, **hidden)
        chosen = self.network.input(
            self._choose_network, self.network, [self.status, self.methods, *self.controls.values()], **hidden
        )
        more = [event.then(self._sample, settings, results, **QUEUE, **hidden) for event in (drop, chosen)]
        self.methods.change(
            lambda names: [gr.Group(visible=name in names) for name in self.panels],
            self.methods,
            list(self.panels.values()),
            **hidden,
        )
        cancel = self.cancel_button.click(None, cancels=[sampling, *more])
        cancel.then(lambda: show_status("Cancelled."), None, self.status, queue=False, **hidden)

    def _values(self, methods: list[str], values: tuple[Value, ...]) -> dict[str, Value]:
        """Return the values by name; methods that are not chosen have scale 0."""
        named = dict(zip(self.controls, values, strict=True))
        return named | {f"{name}.scale": 0.0 for name in self.panels if name not in methods}

    def _sample(
        self, network: str, methods: list[str], kept: dict[str, Value] | None, *values: Value
    ) -> Iterator[dict[Any, Any]]:
        try:
            named, last_frame = self._values(methods, values), 0.0
            yield {self.status: show_status("Sampling …")}  # frames leave it alone: one may arrive after Cancel
            for comparison in self.playground.compare(network, named, kept):
                image_rows = {self.image_rows: show_rows(comparison.rows)}
                if comparison.is_finished:
                    yield image_rows | self._result(comparison)
                elif time.monotonic() - last_frame > FRAME_SECONDS:
                    last_frame = time.monotonic()
                    yield image_rows
        except UserError as error:
            yield {self.status: show_status(self.playground.message(error), refused=True)}

    def _result(self, comparison: Comparison) -> dict[Any, Any]:
        rows, names = comparison.finished_rows, list(comparison.requests)
        first = rows[names[0]]
        num_steps, sites = len(first.chains[0]), list(first.run.network.sites)
        sag = first.run.config.guidances.get("sag")
        site = getattr(sag, "site", sites[-1]).split(",")[0]
        keys = self.playground.offer(comparison)
        return {
            self.status: show_status("Done."),
            self.shown: comparison,
            self.command: _join(names, [comparison.command(name) for name in names]),
            self.python: _join(names, [comparison.python(name) for name in names]),
            self.downloads: show_downloads(keys),
            self.row: gr.Dropdown(list(rows), value=names[0]),
            self.sample_id: gr.Dropdown(first.ids, value=first.ids[0]),
            self.site: gr.Dropdown(sites, value=site),
            self.position: gr.Slider(maximum=max(1, num_steps - 1), value=num_steps // 2),
        }

    def _show_step(self, shown: Comparison | None, row: str, sample_id: int, position: float, site: str) -> str:
        if shown is None or row not in shown.finished_rows:
            return ""
        try:
            with refuse_out_of_memory("num_samples"):
                return show_step(shown.finished_rows[row], sample_id, int(position), site)
        except UserError as error:
            return show_status(self.playground.message(error), refused=True)

    def _keep(
        self, network: str, methods: list[str], kept: dict[str, Value] | None, *values: Value
    ) -> tuple[dict[str, Value] | None, str]:
        try:
            named = self._values(methods, values)
            self.form.request(network, named)
        except UserError as error:
            return kept, show_status(self.playground.message(error), refused=True)
        return named, show_status("These settings are A. Change them, and sample: both have the same seeds.")

    def _choose_network(self, network: str) -> dict[Any, Any]:
        try:
            values = self.form.start_values(network)
        except UserError as error:
            return {self.status: show_status(self.playground.message(error), refused=True)}
        active = [name for name in self.panels if values[f"{name}.scale"]]
        return {self.methods: active} | {control: values[name] for name, control in self.controls.items()}


def _element_id(control: Control) -> str:
    return control.name.replace(".", "-")


def _join(names: list[str], texts: list[str]) -> str:
    """Return the texts of all rows, under their names if there are several."""
    return "\n".join(f"# {name}\n{text}" if len(names) > 1 else text for name, text in zip(names, texts, strict=True))
