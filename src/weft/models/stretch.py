"""How rotary frequencies are stretched for a longer context than a model began with. Torch-free."""

from __future__ import annotations

from math import log

from pydantic import BaseModel, ConfigDict, Field


class RopeScaling(BaseModel):
    """Llama 3.1's stretch of the rotary frequencies (The Llama 3 Herd of Models, 2024)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: float = Field(description="what slow frequencies are divided by")
    low_freq_factor: float = Field(description="those that turn less often than this in the old context are slow")
    high_freq_factor: float = Field(description="those that turn more often are left alone; between the two, a blend")
    original_max_seq: int = Field(description="the context before the stretch")


class Yarn(BaseModel):
    """YaRN's stretch of the rotary frequencies (Peng et al., 2023), with DeepSeek-V2's two scales of attention."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: float = Field(ge=1, description="times as many positions as `original_max_seq`")
    original_max_seq: int = Field(ge=1, description="the context before the stretch")
    beta_fast: float = Field(32.0, gt=0, description="frequencies that turn more often than this are left alone")
    beta_slow: float = Field(1.0, gt=0, description="those that turn less often are stretched by the whole factor")
    mscale: float = Field(
        1.0, gt=0, description="of the rotated numbers: 1 + 0.1 · mscale · ln(factor), over that of mscale_all_dim"
    )
    mscale_all_dim: float = Field(
        1.0, gt=0, description="of the scores: the square of 1 + 0.1 · mscale_all_dim · ln(factor)"
    )

    @property
    def rotated_scale(self) -> float:
        """What cos and sin are multiplied with."""
        return self._scale(self.mscale) / self._scale(self.mscale_all_dim)

    @property
    def score_scale(self) -> float:
        """What attention's scores are multiplied with."""
        return self._scale(self.mscale_all_dim) ** 2

    def _scale(self, mscale: float) -> float:
        return 1 + 0.1 * mscale * log(self.factor)
