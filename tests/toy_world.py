"""A complete world in one file: the pixels of the near future from those of the present, by two convolutions."""

import sys
from dataclasses import dataclass

import torch.nn as nn

import VJepa_AUTO_V2 as V


@dataclass
class ToyConfig(V.ClipConfig):
    image_size: int | tuple = 32  # pixels, one number or H,W
    num_frames: int = 8  # frames per clip
    soon_frames: int = 4  # frames to predict
    hidden: int = 32  # channels between the convolutions
    out_dir: str = "runs/toy"  # everything the run writes

    RANGES = {"hidden": (1, 4096)}
    MUST_MATCH = ("hidden",)


class Toy(V.World):
    """Predict the near future in pixels."""

    Config = ToyConfig
    KEYS = {"loss_pixel": "L1 of the predicted frames", "skill": "1 - that over the L1 of the last frame repeated"}

    def __init__(self, cfg, rank=0, world_size=1):
        super().__init__(cfg, rank, world_size)
        self.look_back = nn.Conv2d(3 * cfg.now_frames, cfg.hidden, 5, padding=2)
        self.look_ahead = nn.Conv2d(cfg.hidden, 3 * cfg.soon_frames, 5, padding=2)

    def forward(self, batch):
        clip = batch["frames"].float() / 255  # [B, T, 3, H, W]
        now, soon = clip[:, : self.cfg.now_frames], clip[:, self.cfg.now_frames :]
        change = self.look_ahead(self.look_back(now.flatten(1, 2)).relu()).unflatten(1, soon.shape[1:3])
        loss, still = (now[:, -1:] + change - soon).abs().mean(), (now[:, -1:] - soon).abs().mean()
        return self.weigh({"loss_pixel": loss}), {"skill": 1 - loss.detach() / still}, {}


if __name__ == "__main__":
    sys.exit(V.main(world=Toy))
