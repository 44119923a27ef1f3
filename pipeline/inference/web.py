"""The page of `pal ask --web`: drop or record a clip, see it, ask about it, switch pathways off.

The one door to gradio. No telemetry, no share links, nothing from other hosts; what visitors give goes after an hour.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UserError
from pipeline.core.streams import IntegrationKind
from pipeline.inference.encode_audio import SPECTROGRAM_HIGHEST_HZ, AudioEncoders, Sound, spectrogram
from pipeline.inference.responder import Responder
from pipeline.model import PrefixCache
from pipeline.plots import plot_spectrogram

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise UserError("--web", "needs gradio", "pip install 'pal-pipeline[web]'") from error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLACES: dict[IntegrationKind, str] = {
    "lal": "beside the text",
    "plits": "in the sequence",
    "flamingo": "by gated cross-attention",
}
COLUMNS = {"question": "24%", "heard through": "13%", "first token (s)": "9%", "tokens/s": "9%", "answer": "45%"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
NOTHING_ASKED: tuple[str, str, list[list[str]]] = ("", "", [])  # line, answer, table
FORGOTTEN_AFTER_S = 3600  # a visitor's clip: on disk, and what the model keeps of it


@dataclass
class EncodedClip:
    """A visitor's clip, heard once.

    Attributes:
        prefixes: hidden pathways -> what the model read of the clip without them.
        rows: the table of what was answered, newest first.
    """

    sound: Sound
    prefixes: dict[frozenset[IntegrationKind], PrefixCache] = field(default_factory=dict)
    rows: list[list[str]] = field(default_factory=list)


class Page:
    """What the page does; `build` lays it out.

    Args:
        name: of the model, for the heading.
    """

    def __init__(self, responder: Responder, audio_encoders: AudioEncoders, name: str) -> None:
        self._responder, self._audio_encoders, self._name = responder, audio_encoders, name
        self._pathways = sorted({spec.integration for spec in responder.model.specs})

    def hear(self, file: str | None) -> tuple[EncodedClip | None, Figure | None, str, str, str, list[list[str]]]:
        """Hears a clip that was dropped or recorded.

        Returns:
            the clip (None where there is none, or none that can be heard), its spectrogram, a line about it; the line
            about the newest question, its answer and the table: all empty.
        """
        if file is None:
            return None, None, "", *NOTHING_ASKED
        path = Path(file)
        try:
            sound = self._audio_encoders.encode(path)
            columns = spectrogram(path)
        except UserError as error:
            return None, None, f"⚠️ **{path.name}** {error.fault}; {error.remedy}.", *NOTHING_ASKED
        heard = EncodedClip(sound)
        kept_mib = self._prefix(heard, self._pathways).nbytes / 2**20
        picture = plot_spectrogram(columns, sound.duration_s, SPECTROGRAM_HIGHEST_HZ, path.name)
        return (
            heard,
            picture,
            f"EncodedClip {sound.duration_s:.1f} s; {kept_mib:.1f} MiB kept for questions.",
            *NOTHING_ASKED,
        )

    def ask(
        self, heard: EncodedClip | None, question: str, pathways: Collection[IntegrationKind]
    ) -> Iterator[tuple[str, str, list[list[str]]]]:
        """Line about the question, answer as far as it has come, table."""
        if heard is None:
            yield "⚠️ Drop or record a clip first.", "", []
            return
        if not question.strip():
            yield "⚠️ Type a question first.", "", heard.rows
            return
        prefix = self._prefix(heard, pathways)
        pieces: SimpleQueue[str | None] = SimpleQueue()
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(self._responder.answer_aloud, prefix, question, pieces.put)
            asked.add_done_callback(lambda _: pieces.put(None))
            text = ""
            while (piece := pieces.get()) is not None:
                text += piece
                yield "", text, heard.rows
        try:
            answer = asked.result()
        except UserError as error:
            yield f"⚠️ {error}", "", heard.rows
            return
        rate = "" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.0f}"
        through = " + ".join(kind.upper() for kind in self._pathways if kind in pathways) or "nothing"
        heard.rows.insert(0, [question, through, f"{answer.first_token_s:.2f}", rate, answer.answer])
        yield "", text, heard.rows

    def ask_again(
        self, heard: EncodedClip | None, pathways: Collection[IntegrationKind]
    ) -> Iterator[tuple[str, str, list[list[str]]]]:
        """The newest question, with other pathways; nothing where none was asked."""
        if heard is not None and heard.rows:
            yield from self.ask(heard, heard.rows[0][0], pathways)

    def build(self) -> gr.Blocks:
        """Every visitor has a clip and a table of their own; the model serves one at a time."""
        with gr.Blocks(
            title="pal ask", analytics_enabled=False, delete_cache=(FORGOTTEN_AFTER_S, FORGOTTEN_AFTER_S)
        ) as page:
            gr.Markdown(f"## Ask about a clip\nModel: `{self._name}`")
            heard = gr.State(None, time_to_live=FORGOTTEN_AFTER_S)
            with gr.Row():
                with gr.Column():
                    clip = gr.Audio(
                        sources=["upload", "microphone"], type="filepath", label="Clip", editable=False, buttons=[]
                    )
                    about_clip = gr.Markdown()
                    picture = gr.Plot(show_label=False, format="png")
                with gr.Column():
                    question = gr.Textbox(label="Question", placeholder="What do you hear?", lines=1)
                    button = gr.Button("Ask", variant="primary")
                    pathways = gr.CheckboxGroup(
                        [(self._label(kind), kind) for kind in self._pathways],
                        value=self._pathways,
                        label="The model hears through",
                        info="Switch a pathway off, and the newest question is asked again without it.",
                    )
                    answer = gr.Textbox(label="Answer", lines=3, interactive=False)
                    status = gr.Markdown()
            table = gr.Dataframe(
                headers=list(COLUMNS),
                column_widths=list(COLUMNS.values()),
                label="Answers about this clip",
                interactive=False,
                wrap=True,
            )
            clip.change(self.hear, clip, [heard, picture, about_clip, status, answer, table], **ONE_AT_A_TIME)
            told = [status, answer, table]
            gr.on([question.submit, button.click], self.ask, [heard, question, pathways], told, **ONE_AT_A_TIME)
            pathways.input(self.ask_again, [heard, pathways], told, trigger_mode="always_last", **ONE_AT_A_TIME)
        return page

    def _prefix(self, heard: EncodedClip, pathways: Collection[IntegrationKind]) -> PrefixCache:
        hidden = frozenset(self._pathways) - frozenset(pathways)
        if hidden not in heard.prefixes:
            heard.prefixes[hidden] = self._responder.prefill([heard.sound.features], hidden)
        return heard.prefixes[hidden]

    def _label(self, kind: IntegrationKind) -> str:
        """A pathway, and what the model gets through it."""
        streams = [spec for spec in self._responder.model.specs if spec.integration == kind]
        heard = [("a summary of " if s.summary_of is not None else "") + " and ".join(s.encoders) for s in streams]
        return f"{kind.upper()}: {', '.join(heard)}, {PLACES[kind]}"


def serve(responder: Responder, audio_encoders: AudioEncoders, name: str, host: str, port: int) -> None:
    """Serves the page until Ctrl-C.

    Args:
        name: of the model, for the heading.

    Raises:
        UserError: nothing can be served at this address.
    """
    warnings.filterwarnings("ignore", module="gradio")  # of its own use of other libraries
    page = Page(responder, audio_encoders, name).build()
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError("--address", f"{host}:{port} cannot be served at", "give another --address") from error
    print(f"http://{host}:{port} (Ctrl-C ends)", flush=True)
    page.block_thread()
