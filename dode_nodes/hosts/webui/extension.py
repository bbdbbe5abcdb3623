"""What the host finds: the sampler, an accordion in txt2img and img2img, an axis of the X/Y/Z plot, a tab, a route."""

from __future__ import annotations

from typing import Any

import gradio as gr
from modules import script_callbacks, scripts
from modules.ui_common import create_refresh_button

from . import axis, folders, route, samplers, tab
from .names import AUTO, INFOTEXT, SAMPLER, STOCK


def load() -> None:
    """Whenever the host loads its scripts: at its start, and when its UI is reloaded."""
    samplers.register()
    script_callbacks.on_before_ui(axis.add)
    script_callbacks.on_ui_tabs(tab.make)
    script_callbacks.on_app_started(route.add)
    script_callbacks.on_script_unloaded(_unload)


def _unload() -> None:
    axis.remove()
    samplers.unregister()


class DodeScript(scripts.Script):
    """Which table the sampler D-ODE takes."""

    def title(self) -> str:
        """As the API names it, too."""
        return SAMPLER

    def show(self, is_img2img: bool) -> Any:
        """In both tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """One drop-down. It takes names that it does not have: of an infotext, whose table may be missing here."""
        with gr.Accordion(SAMPLER, open=False, elem_id=self.elem_id("accordion")):
            with gr.Row():
                table = gr.Dropdown(
                    folders.choices(),
                    value=AUTO,
                    label="λ table",
                    allow_custom_value=True,
                    elem_id=self.elem_id("table"),
                )
                create_refresh_button(
                    table,
                    lambda: None,
                    lambda: {"choices": folders.choices()},
                    self.elem_id("refresh_tables"),
                )
            gr.Markdown(
                f"Choose the sampling method **{SAMPLER}** to sample with a λ table. *{AUTO}* takes the table for "
                f"your checkpoint. Without a table, **{STOCK}** runs. The table sets the σ: the schedule type "
                "has no effect."
            )
        self.infotext_fields = [(table, INFOTEXT)]
        self.paste_field_names = [INFOTEXT]
        return [table]

    def process(self, p: Any, table: str | None = None, *unused: Any) -> None:
        """Choose before prompts are scheduled over the steps: a table may have another number of them."""
        if SAMPLER not in (p.sampler_name, getattr(p, "hr_sampler_name", None)):
            return
        from .sampler import prepare

        prepare(p, table)
