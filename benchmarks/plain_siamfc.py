"""SiamFC's published tracking and pair cutting, written plainly: what benchmarks and tests compare with.

From the description of github.com/huanglianghua/siamfc-pytorch in its own terms: boxes count from 1, centres are
(y, x), the whole frame is padded for each crop.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F


def padded_patch(
    image: np.ndarray, center_yx: np.ndarray, side: float, out_size: int, color: np.ndarray, interpolation: int
) -> tuple[np.ndarray, int]:
    """Pad the whole frame, cut a square and resize it: uint8 (out_size, out_size, 3), px of padding."""
    side = round(side)
    first = np.round(center_yx - (side - 1) / 2)
    (top, left), (bottom, right) = first.astype(int), np.round(first + side).astype(int)
    pad = int(max(0, -top, -left, bottom - image.shape[0], right - image.shape[1]))
    image = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=color)
    patch = image[top + pad : bottom + pad, left + pad : right + pad]
    return cv2.resize(patch, (out_size, out_size), interpolation=interpolation), pad


class PlainTracker:
    """Track one object, one patch after the other; NumPy 2's own float types.

    Args:
        features: images (B, 3, S, S) -> features.
    """

    def __init__(self, features, scale_num=3, scale_step=1.0375, scale_penalty=0.9745):
        self.features, self.scale_num, self.scale_penalty = features, scale_num, scale_penalty
        self.scales = scale_step ** np.linspace(-(scale_num // 2), scale_num // 2, scale_num)
        self.hann = np.outer(np.hanning(272), np.hanning(272))
        self.hann /= self.hann.sum()

    def patch(self, image, side, out_size):
        patch, pad = padded_patch(image, self.center, side, out_size, self.color, cv2.INTER_LINEAR)
        half = side / 2
        self.num_padded += pad > 0
        self.num_outside += bool((self.center + half <= 0).any() or (self.center - half >= image.shape[:2]).any())
        return patch

    def init(self, image, box):
        """Take the first frame, uint8 (H, W, 3) RGB, and a box x, y, width, height, 1-based px."""
        self.num_padded = self.num_outside = 0
        self.used_scales = []
        x, y, w, h = box
        self.center = np.array([y - 1 + (h - 1) / 2, x - 1 + (w - 1) / 2], dtype=np.float32)
        self.target = np.array([h, w], dtype=np.float32)
        context = 0.5 * np.sum(self.target)
        self.z_side = np.sqrt(np.prod(self.target + context))
        self.x_side = self.z_side * 255 / 127
        self.color = np.mean(image, axis=(0, 1))
        patch = self.patch(image, self.z_side, 127)
        self.kernel = self.features(torch.from_numpy(patch).permute(2, 0, 1).unsqueeze(0).float())

    def update(self, image):
        """Find the object in the next frame: box x, y, width, height, 1-based px."""
        patches = np.stack([self.patch(image, self.x_side * scale, 255) for scale in self.scales])
        x = self.features(torch.from_numpy(patches).permute(0, 3, 1, 2).float())
        responses = (F.conv2d(x, self.kernel) * 0.001).squeeze(1).numpy()
        responses = np.stack([cv2.resize(small, (272, 272), interpolation=cv2.INTER_CUBIC) for small in responses])
        responses[: self.scale_num // 2] *= self.scale_penalty
        responses[self.scale_num // 2 + 1 :] *= self.scale_penalty
        best = np.argmax(np.amax(responses, axis=(1, 2)))
        self.used_scales.append(int(best))
        response = responses[best]
        response -= response.min()
        response /= response.sum() + 1e-16
        response = (1 - 0.176) * response + 0.176 * self.hann
        loc = np.unravel_index(response.argmax(), response.shape)
        self.center += (np.array(loc) - (272 - 1) / 2) * 8 / 16 * self.x_side * self.scales[best] / 255
        scale = (1 - 0.59) * 1.0 + 0.59 * self.scales[best]
        self.target *= scale
        self.z_side *= scale
        self.x_side *= scale
        left = self.center[1] + 1 - (self.target[1] - 1) / 2
        top = self.center[0] + 1 - (self.target[0] - 1) / 2
        return np.array([left, top, self.target[1], self.target[0]])
