"""Videos of a policy, through TorchRL's ``VideoRecorder``."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.record import VideoRecorder

from iql_torchrl.evaluation.rollout import check_arguments, evaluate

__all__ = ["filmed", "record_video"]

MakeEnv = Callable[[], gymnasium.Env[Any, Any]]


def record_video(
    policy: TensorDictModuleBase,
    make_env: MakeEnv,
    path: str | Path,
    *,
    episodes: int = 1,
    seed: int,
    max_steps: int | None = None,
    fps: int | None = None,
) -> Path:
    """Write an H.264 video of ``policy`` and return its path.

    It shows the episodes that :func:`~iql_torchrl.evaluate` runs with the same ``seed`` and
    ``max_steps`` (with deterministic actions), each with one frame at the start and
    one after each step. The frames of one episode are kept in memory. Needs the extra ``video``.

    Args:
        policy: as for :func:`~iql_torchrl.evaluate`.
        make_env: called once for each episode, and once before; its environments must have
            ``render_mode="rgb_array"``.
        path: ends in ``.mp4``; a missing folder is created, an existing file is replaced after the
            last episode.
        fps: frames per second, by default the environment's ``metadata["render_fps"]``, or 30.

    Raises:
        ImportError: the extra is not installed.
        TypeError, ValueError: as from :func:`~iql_torchrl.evaluate`; ``path`` or ``fps`` is wrong,
            or an environment gives no frames.
    """
    check_arguments(policy, make_env, episodes, 1, seed, max_steps)
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"path must end in .mp4, found {str(path)!r}")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int) or fps < 1):
        raise ValueError(f"fps must be an integer of at least 1, or None, found {fps!r}")
    imageio = _imageio()
    fps = fps or _frames_per_second(make_env)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        with imageio.imopen(temporary, "w", plugin="pyav", extension=".mp4") as film:
            film.init_video_stream("libx264", fps=fps)
            recorder = VideoRecorder(_Film(film), tag=path.stem, skip=1)
            for episode in range(episodes):
                evaluate(
                    policy,
                    filmed(make_env, recorder),
                    episodes=1,
                    num_envs=1,
                    seed=seed + episode,
                    max_steps=max_steps,
                )
                recorder.dump()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def filmed(make_env: MakeEnv, recorder: VideoRecorder) -> MakeEnv:
    """``make_env`` whose environments send a frame to ``recorder`` at each reset and step.

    For :func:`~iql_torchrl.evaluate` with ``num_envs=1``, and any logger of TorchRL's:
    ``recorder = VideoRecorder(logger, tag="film", skip=1)``, then ``recorder.dump()``.
    """

    def make() -> gymnasium.Env[Any, Any]:
        return _Filmed(make_env(), recorder)

    return make


class _Filmed(gymnasium.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: gymnasium.Env[Any, Any], recorder: VideoRecorder) -> None:
        _check_renders(env)
        super().__init__(env)
        self._recorder = recorder

    def reset(self, **kwargs: Any) -> Any:
        start = super().reset(**kwargs)
        self._show()
        return start

    def step(self, action: Any) -> Any:
        result = super().step(action)
        self._show()
        return result

    def _show(self) -> None:
        frame: Any = self.env.render()
        if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.dtype != np.uint8:
            raise ValueError(
                f"render() of {self.env} gave {getattr(frame, 'shape', type(frame).__name__)}; "
                f"expected a picture (height, width, 3) of uint8"
            )
        self._recorder(TensorDict({"pixels": torch.from_numpy(frame.copy())}))


class _Film:
    """The logger that a ``VideoRecorder`` needs; it receives videos ``(1, T, C, H, W)``."""

    # TorchRL's own writer of .mp4, TorchCodec, needs an FFmpeg of the system, and from PyPI on
    # Linux since 0.14 a CUDA build of torch; PyAV's wheels need neither.
    def __init__(self, film: Any) -> None:
        self._film = film

    def log_video(self, name: str, video: Tensor, **_: Any) -> None:
        for frame in video[0].permute(0, 2, 3, 1).numpy():
            self._film.write_frame(_even(frame))


def _even(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Common H.264 needs even sizes: repeat the last row or column of an odd one."""
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return frame


def _check_renders(env: gymnasium.Env[Any, Any]) -> None:
    """Raise ``ValueError`` with advice unless ``env`` renders frames."""
    if env.render_mode == "rgb_array":
        return
    if env.spec is None:
        advice = f'{type(env.unwrapped).__name__}(render_mode="rgb_array"), if it knows that'
    else:
        advice = 'lambda: gymnasium.make(make_env().spec, render_mode="rgb_array")'
    raise ValueError(
        f"make_env gives an environment with render_mode={env.render_mode!r}; videos need one "
        f"with 'rgb_array': pass {advice}"
    )


def _frames_per_second(make_env: MakeEnv) -> int:
    env = make_env()
    try:
        _check_renders(env)
        return int(env.metadata.get("render_fps") or 30)
    finally:
        env.close()


def _imageio() -> ModuleType:
    if find_spec("imageio") is None or find_spec("av") is None:
        raise ImportError(
            'a video is written by imageio and PyAV; install them with pip install "iql_torchrl[video]"'
        )
    import imageio.v3

    return imageio.v3
