"""`cvi explain` over a folder of any size, one job for each share of it; what was killed goes on where it was.

snakemake -s paper/cluster/explain.smk --cores all --config images=imagenet/val model=torchvision:resnet50 out=maps \
    shares=16 options="--budget 64 --no-pictures" device=auto

On Slurm add `--workflow-profile paper/cluster/slurm` and `gpu=1 minutes=240` to the configuration. DIR/images and
DIR/clusters are read as one table: pandas.read_parquet("maps/images").
"""

import shlex
import sys

SHARES = int(config.get("shares", 1))
ASKED = [config["images"], "--model", config["model"], "--out", config["out"], "--device", config.get("device", "auto")]
ASKED += shlex.split(config.get("options", "--no-pictures"))


rule all:
    input:
        [f"{config['out']}/shares/{k}-of-{SHARES}" for k in range(1, SHARES + 1)],


rule share:
    output:
        touch(f"{config['out']}/shares/{{k}}-of-{SHARES}"),
    params:
        command=shlex.join([sys.executable, "-m", "cvi_nb.cli", "explain", *ASKED, "--resume", "--quiet", "--shard"]),
    threads: int(config.get("threads", 1))
    resources:
        mem_mb=int(config.get("memory_mb", 4000)),
        gpu=int(config.get("gpu", 0)),
        runtime=int(config.get("minutes", 240)),
    message:
        f"share {{wildcards.k}} of {SHARES}: {config['images']}"
    shell:
        f"OMP_NUM_THREADS={{threads}} {{params.command}} {{wildcards.k}}/{SHARES}"
