"""Videos of a policy."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from tensordict.nn import TensorDictModuleBase

from iql_torchrl.config.settings import check_whole
from iql_torchrl.evaluation.rollout import MakeEnv, check_arguments, evaluate
from iql_torchrl.files import atomic_write


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
    one after each step. Needs the extra ``video``.

    Args:
        policy: as for :func:`~iql_torchrl.evaluate`.
        make_env: called once; its environment must have ``render_mode="rgb_array"``.
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
    if fps is not None:
        check_whole(fps=fps)
    if find_spec("imageio") is None or find_spec("av") is None:
        raise ImportError(
            'a video is written by imageio and PyAV; install them with pip install "iql_torchrl[video]"'
        )
    import imageio.v3

    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(path) as temporary,
        imageio.v3.imopen(temporary, "w", plugin="pyav", container="mp4") as film,
    ):
        evaluate(
            policy,
            lambda: _Filmed(make_env(), film, fps),
            episodes=episodes,
            num_envs=1,
            seed=seed,
            max_steps=max_steps,
        )
    return path


class _Filmed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that writes a frame to ``film`` at each reset and step."""

    def __init__(self, env: gymnasium.Env[Any, Any], film: Any, fps: int | None) -> None:
        super().__init__(env)
        if env.render_mode != "rgb_array":
            env.close()
            advice = 'lambda: gymnasium.make(make_env().spec, render_mode="rgb_array")'
            if env.spec is None:
                advice = (
                    f'{type(env.unwrapped).__name__}(render_mode="rgb_array"), if it knows that'
                )
            raise ValueError(
                f"make_env gives an environment with render_mode={env.render_mode!r}; videos need "
                f"one with 'rgb_array': pass {advice}"
            )
        film.init_video_stream("libx264", fps=fps or int(env.metadata.get("render_fps") or 30))
        self._film = film

    def reset(self, **options: Any) -> Any:
        start = super().reset(**options)
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
                "expected a picture (height, width, 3) of uint8"
            )
        # common H.264 needs even sizes: the last row or column of an odd one is repeated
        odd = [(0, size % 2) for size in frame.shape[:2]]
        self._film.write_frame(np.pad(frame, (*odd, (0, 0)), mode="edge"))
