"""A Jetson's files, as NVIDIA and Linux write them, in a temporary directory.

The texts are those that people posted from AGX Orins (L4T R36.4.3, R39.2.1); the tree is cut down to what is read.
"""

from __future__ import annotations

from pathlib import Path

R36 = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n"
    "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
    "TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\n"
)
R39 = (
    "# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64, "
    "DATE: Fri Aug 7 05:54:22 AM UTC 2026\n"
    "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
    "TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\n"
)
NVPMODEL_CONF = """\
# FORMAT:
# < PARAM TYPE=PARAM_TYPE NAME=PARAM_NAME >
# ARG1_NAME ARG1_PATH_VAL
# < POWER_MODEL ID=id_num NAME=mode_name >
# PARAM1_NAME ARG11_NAME ARG11_VAL
# < PM_CONFIG DEFAULT=default_mode >
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
# MAXN is the NONE power model to release all constraints
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ -1
< POWER_MODEL ID=1 NAME=MODE_15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=2 NAME=MODE_30W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=3 NAME=MODE_50W >
CPU_ONLINE CORE_0 1
# mandatory section to configure the default power mode
< PM_CONFIG DEFAULT=2 >
"""
CUDA_12 = '{\n   "cuda" : {\n      "name" : "CUDA SDK",\n      "version" : "12.6.11"\n   }\n}\n'
MEMINFO = (
    "MemTotal:       64336988 kB\nMemFree:        48231234 kB\nMemAvailable:   60012345 kB\n"
    "HugePages_Total:       0\nSwapTotal:      32168480 kB\nSwapFree:       32168480 kB\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    """Files by their paths below root."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    return root


def thermal_zone(number: int, name: str, temperature: str, trips: dict[str, int]) -> dict[str, str]:
    """A zone's files; trips: degrees in thousandths by their kind, which may carry a number ("active1")."""
    folder = f"sys/class/thermal/thermal_zone{number}"
    files = {f"{folder}/type": f"{name}\n", f"{folder}/temp": temperature}
    for index, (kind, at) in enumerate(trips.items()):
        files[f"{folder}/trip_point_{index}_type"] = f"{kind.rstrip('0123456789')}\n"
        files[f"{folder}/trip_point_{index}_temp"] = f"{at}\n"
    return files


def cooling_device(number: int, name: str, state: int) -> dict[str, str]:
    folder = f"sys/class/thermal/cooling_device{number}"
    return {f"{folder}/type": f"{name}\n", f"{folder}/cur_state": f"{state}\n", f"{folder}/max_state": "2\n"}


def cpu(number: int, lowest: int, highest: int, online: int = 1) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu{number}"
    return {
        f"{folder}/online": f"{online}\n",
        f"{folder}/cpufreq/scaling_min_freq": f"{lowest}\n",
        f"{folder}/cpufreq/scaling_max_freq": f"{highest}\n",
    }


def gpu(lowest: int, highest: int) -> dict[str, str]:
    folder = "sys/class/devfreq/17000000.gpu"
    return {f"{folder}/min_freq": f"{lowest}\n", f"{folder}/max_freq": f"{highest}\n"}


def agx_orin(root: Path) -> Path:
    """An AGX Orin with JetPack 6.2 whole, in its fastest mode, clocks fixed, cool."""
    return     write(root, {
        "etc/nv_tegra_release": R36,
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "proc/meminfo": MEMINFO,
        "etc/nvpmodel.conf": NVPMODEL_CONF,
        "var/lib/nvpmodel/status": "pmode:0000 fmode:fanNull\n",
        "usr/local/cuda/version.json": CUDA_12,
        "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
        **cpu(0, 2201600, 2201600), **cpu(1, 2201600, 2201600), **cpu(10, 729600, 2201600, online=0),
        **gpu(1300500000, 1300500000),
        **thermal_zone(0, "cpu-thermal", "47312\n", {"active": 51000, "passive": 99000, "critical": 104500}),
        **thermal_zone(1, "gpu-thermal", "44000\n", {"passive": 99000, "critical": 104500}),
        **thermal_zone(8, "tj-thermal", "48593\n", {"active": 74000, "active2": 95000}),
        **cooling_device(0, "cpufreq-cpu0", 0), **cooling_device(7, "pwm-fan", 1),
        **cooling_device(8, "cpu-throttle-alert", 0), **cooling_device(9, "gpu-throttle-alert", 0),
    })  # fmt: skip
