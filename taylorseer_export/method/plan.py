"""The plan: which steps of the denoising loop are full steps and which are forecast steps."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Literal, get_args

from taylorseer_export.errors import ConfigError
from taylorseer_export.method.weights import check_order

Dialect = Literal["original", "diffusers"]

FULL, FORECAST = "F", "."
FEW_STEPS = 10  # of a distilled model: 4 to 8, and as diffusers counts them 9 of Z-Image-Turbo


@dataclass(frozen=True)
class Plan:
    """The kind of every step, as text: `F` a full step, `.` a forecast step.

        str(Plan.regular(14, 5, 3))  =  "FFF....F....F."

    A plan begins with a full step, since a forecast needs something to start from. Steps are
    indices into the loop, 0 first; they are not timesteps.

    Args:
        text: One character per step.

    Raises:
        ConfigError: The text is empty, has another character, or does not begin with `F`.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ConfigError(f"plan is {self.text!r}, expected text of one `F` or `.` per step, such as `FFF....F`")
        if not self.text:
            raise ConfigError("plan is empty, expected one `F` or `.` per step; write a plan such as `FFF....F`")
        for step, kind in enumerate(self.text):
            if kind not in (FULL, FORECAST):
                raise ConfigError(
                    f"plan has `{kind}` at step {step}, expected `F` (full step) or `.` (forecast "
                    "step); write a plan such as `FFF....F`"
                )
        if self.text[0] != FULL:
            raise ConfigError(
                "step 0 is a forecast step but the history is empty, expected a full step; begin the plan with `F`"
            )

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read a printed plan; `Plan.parse(str(plan)) == plan`. Raises what `Plan` raises."""
        return cls(text)

    @classmethod
    def all_full(cls, steps: int) -> "Plan":
        """The plan that forecasts nothing; raises `ConfigError` where `steps` is below 1."""
        return cls(FULL * steps)

    @classmethod
    def regular(cls, steps: int, interval: int, warmup: int, dialect: Dialect = "original") -> "Plan":
        """A warm-up of full steps, then one full step every `interval` steps.

        With W the warm-up and N the interval, step s is a full step if s < W or

            original     (s - W + 1) mod N = 0      first forecast stretch N - 1 long
            diffusers    (s - W - 1) mod N = 0      first forecast stretch 1 long (N > 1)

        No full step is forced at the end; the last step is normally a forecast step.

        Args:
            steps: Length of the loop. Unit: steps.
            interval: Distance between full steps after warm-up, 1 for all full. Unit: steps.
            warmup: Full steps at the start; clipped to `steps`. Unit: steps.
            dialect: Rule after warm-up; `original` is that of the paper's code, so the default.

        Raises:
            ConfigError: A number is below 1, or the dialect is unknown.

        Source:
            Liu et al. 2025, arXiv:2503.06923; `diffusers` as in its TaylorSeer cache hook.
        """
        for name, value in (("steps", steps), ("interval", interval), ("warmup", warmup)):
            if not isinstance(value, Integral) or value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1 (steps); pass a whole number, 1 or more")
        if dialect not in get_args(Dialect):
            known = ", ".join(f"`{name}`" for name in get_args(Dialect))
            raise ConfigError(f"dialect is `{dialect[:64]}`, expected one of {known}; use `original` for the paper's")
        shift = 1 if dialect == "original" else -1
        return cls(
            "".join(FULL if s < warmup or (s - warmup + shift) % interval == 0 else FORECAST for s in range(steps))
        )

    @classmethod
    def guarded(cls, steps: int, warmup: int) -> "Plan":
        """The plan that a guard starts from: a warm-up, then forecasts, and a full step at the end.

        Args:
            steps: Length of the loop. Unit: steps.
            warmup: Full steps at the start; clipped to `steps`. Unit: steps.

        Raises:
            ConfigError: A number is below 1.

        Source:
            arXiv:2508.02240, which forecasts neither during the warm-up nor on the last step.
        """
        text = str(cls.regular(steps, steps + 1, warmup))
        return cls(text[:-1] + FULL)

    def __str__(self) -> str:
        return self.text

    def __len__(self) -> int:
        return len(self.text)

    @property
    def steps(self) -> int:
        """Length of the loop. Unit: steps."""
        return len(self.text)

    @cached_property
    def full_steps(self) -> tuple[int, ...]:
        """The indices of the full steps, in order."""
        return tuple(step for step, kind in enumerate(self.text) if kind == FULL)

    @property
    def warmup(self) -> int:
        """Length of the leading run of full steps. Unit: steps."""
        return len(self.text) - len(self.text.lstrip(FULL))

    @property
    def history_start(self) -> int:
        """First step whose features are kept: max(warmup - 2, 0), as in the paper's code."""
        return max(self.warmup - 2, 0)

    @property
    def ceiling(self) -> float:
        """Speed-up if forecast steps cost nothing: steps / full steps, dimensionless."""
        return self.steps / len(self.full_steps)

    def is_full(self, step: int) -> bool:
        """Whether `step` is a full step.

        Raises:
            ConfigError: The plan has no such step.
        """
        if not 0 <= step < self.steps:
            raise ConfigError(
                f"step is {step}, expected 0 to {self.steps - 1} (steps); give a plan of the length of the loop"
            )
        return self.text[step] == FULL

    def history(self, step: int, order: int) -> tuple[int, ...]:
        """The full steps that a forecast or an update at `step` draws on, oldest first.

        They are the last `order + 1` full steps before `step` and not before `history_start`. Fewer
        exist early on: none on the first full steps, so the effective order ramps up.

        Args:
            step: A step of the plan, itself never part of the answer. Unit: steps.
            order: Highest order used, 0 to 4, dimensionless.

        Raises:
            ConfigError: The plan has no such step, or `order` is not 0 to 4.
        """
        check_order(order)
        self.is_full(step)  # refuses a step that is not in the plan
        first, last = (bisect_left(self.full_steps, s) for s in (self.history_start, step))
        return self.full_steps[max(first, last - order - 1) : max(first, last)]

    def check_length(self, steps: int) -> None:
        """Refuse a loop of another length than the plan.

        Raises:
            ConfigError: `steps` is not the length of the plan.
        """
        if steps != self.steps:
            raise ConfigError(
                f"plan {self} is {self.steps} steps long, expected {steps} (steps); pass a plan "
                f"of {steps} characters or run {self.steps} steps"
            )
