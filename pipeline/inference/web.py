"""The web page of `pal ask --web`: upload or record a clip, see its spectrogram, ask about it, switch pathways off.

The page has no telemetry, no share links and loads nothing from other hosts; visitors' clips are deleted after an hour.
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
from pipeline.core.units import MIB
from pipeline.inference.encode_audio import SPECTROGRAM_HIGHEST_HZ, AudioEncoders, EncodedAudio, spectrogram
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

INTEGRATIONS: dict[IntegrationKind, str] = {
    "lal": "keys and values beside the text",
    "plits": "tokens in the sequence",
    "flamingo": "gated cross-attention",
}
COLUMNS = {"question": "24%", "pathways": "13%", "first token (s)": "9%", "tokens/s": "9%", "answer": "45%"}
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
NO_ANSWER: tuple[str, str, list[list[str]]] = ("", "", [])  # status, answer, table
KEPT_S = 3600  # lifetime of a visitor's clip on disk and of its prefix caches in memory


@dataclass
class ClipSession:
    """A visitor's clip, encoded once, and its answers.

    Attributes:
        audio: features of the clip.
        prefixes: hidden pathways -> prefix cache of the clip without them.
        rows: rows of the table of answers, newest first.
    """

    audio: EncodedAudio
    prefixes: dict[frozenset[IntegrationKind], PrefixCache] = field(default_factory=dict)
    rows: list[list[str]] = field(default_factory=list)


class Page:
    """Event handlers of the page; `build` lays it out.

    Args:
        name: name of the model, for the heading.
    """

    def __init__(self, responder: Responder, audio_encoders: AudioEncoders, name: str) -> None:
        self._responder, self._audio_encoders, self._name = responder, audio_encoders, name
        self._pathways = sorted({spec.integration for spec in responder.model.specs})

    def open_clip(self, file: str | None) -> tuple[ClipSession | None, Figure | None, str, str, str, list[list[str]]]:
        """Encodes and prefills a clip that was uploaded or recorded.

        Returns:
            the session (None without a clip, or if it cannot be decoded), the spectrogram, a status line about the
            clip; an empty status line, answer and table of its questions.
        """
        if file is None:
            return None, None, "", *NO_ANSWER
        path = Path(file)
        try:
            audio = self._audio_encoders.encode(path)
            clip_spectrogram = spectrogram(path)
        except UserError as error:
            return None, None, f"⚠️ **{path.name}** {error.fault}; {error.remedy}.", *NO_ANSWER
        session = ClipSession(audio)
        cache_mib = self._prefix(session, self._pathways).nbytes / MIB
        picture = plot_spectrogram(clip_spectrogram, audio.duration_s, SPECTROGRAM_HIGHEST_HZ, path.name)
        status = f"Encoded {audio.duration_s:.1f} s of audio; its prefix cache takes {cache_mib:.1f} MiB."
        return session, picture, status, *NO_ANSWER

    def ask(
        self, session: ClipSession | None, question: str, pathways: Collection[IntegrationKind]
    ) -> Iterator[tuple[str, str, list[list[str]]]]:
        """Yields the status line, the text of the answer so far and the table of answers, once for each new text."""
        if session is None:
            yield "⚠️ Upload or record a clip first.", "", []
            return
        if not question.strip():
            yield "⚠️ Type a question first.", "", session.rows
            return
        prefix = self._prefix(session, pathways)
        pieces: SimpleQueue[str | None] = SimpleQueue()
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(self._responder.answer_streaming, prefix, question, pieces.put)
            future.add_done_callback(lambda _: pieces.put(None))
            text = ""
            while (piece := pieces.get()) is not None:
                text += piece
                yield "", text, session.rows
        try:
            answer = future.result()
        except UserError as error:
            yield f"⚠️ {error}", "", session.rows
            return
        rate = "" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.0f}"
        names = " + ".join(kind.upper() for kind in self._pathways if kind in pathways) or "none"
        session.rows.insert(0, [question, names, f"{answer.first_token_s:.2f}", rate, answer.answer])
        bound = f"{self._responder.max_new_tokens} tokens, the bound that `--max-new-tokens` sets"
        yield f"⚠️ The answer is truncated at {bound}." if answer.truncated else "", text, session.rows

    def ask_again(
        self, session: ClipSession | None, pathways: Collection[IntegrationKind]
    ) -> Iterator[tuple[str, str, list[list[str]]]]:
        """Answers the newest question with other pathways; yields nothing where there is no question yet."""
        if session is not None and session.rows:
            yield from self.ask(session, session.rows[0][0], pathways)

    def build(self) -> gr.Blocks:
        """Lays out the page. Each visitor has a separate clip and table; the model serves one request at a time."""
        with gr.Blocks(title="pal ask", analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)) as page:
            gr.Markdown(f"## Ask about a clip\nModel: `{self._name}`")
            session = gr.State(None, time_to_live=KEPT_S)
            with gr.Row():
                with gr.Column():
                    clip = gr.Audio(
                        sources=["upload", "microphone"], type="filepath", label="Clip", editable=False, buttons=[]
                    )
                    clip_status = gr.Markdown()
                    picture = gr.Plot(show_label=False, format="png")
                with gr.Column():
                    question = gr.Textbox(label="Question", placeholder="What do you hear?", lines=1)
                    button = gr.Button("Ask", variant="primary")
                    pathways = gr.CheckboxGroup(
                        [(self._label(kind), kind) for kind in self._pathways],
                        value=self._pathways,
                        label="Audio pathways",
                        info="Switch a pathway off to get another answer to the newest question, without it.",
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
            clip.change(self.open_clip, clip, [session, picture, clip_status, status, answer, table], **ONE_AT_A_TIME)
            outputs = [status, answer, table]
            gr.on([question.submit, button.click], self.ask, [session, question, pathways], outputs, **ONE_AT_A_TIME)
            pathways.input(self.ask_again, [session, pathways], outputs, trigger_mode="always_last", **ONE_AT_A_TIME)
        return page

    def _prefix(self, session: ClipSession, pathways: Collection[IntegrationKind]) -> PrefixCache:
        """Returns the prefix cache of a clip with these pathways, which is prefilled on first use."""
        hidden = frozenset(self._pathways) - frozenset(pathways)
        if hidden not in session.prefixes:
            session.prefixes[hidden] = self._responder.prefill([session.audio.features], hidden)
        return session.prefixes[hidden]

    def _label(self, kind: IntegrationKind) -> str:
        """Returns the label of a pathway: its name, the encoders of its streams, and how it integrates them."""
        streams = [spec for spec in self._responder.model.specs if spec.integration == kind]
        inputs = [("a summary of " if s.summary_of is not None else "") + " and ".join(s.encoders) for s in streams]
        return f"{kind.upper()}: {', '.join(inputs)} ({INTEGRATIONS[kind]})"


def serve(responder: Responder, audio_encoders: AudioEncoders, name: str, host: str, port: int) -> None:
    """Serves the page until Ctrl-C.

    Args:
        name: name of the model, for the heading.

    Raises:
        UserError: the address cannot be bound.
    """
    warnings.filterwarnings("ignore", module="gradio")  # about its use of other libraries
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
        raise UserError("--address", f"cannot serve at {host}:{port}", "give another --address") from error
    print(f"http://{host}:{port} (Ctrl-C ends)", flush=True)
    page.block_thread()
