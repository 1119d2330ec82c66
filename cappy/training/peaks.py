"""What GPUs reach at best, by their data sheets."""

from collections.abc import Mapping

PEAKS: Mapping[str, float] = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100 NVL": 8.35e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "L40": 1.81e14,
    "A10G": 7.0e13,
    "L4": 1.21e14,
}
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits counts."""
