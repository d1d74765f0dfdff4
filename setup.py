"""Package metadata, all of it read from settings.ini."""

import os
from configparser import ConfigParser
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def listed(name: str) -> list[str]:
    return settings.get(f"{name}requirements", "").split()


extras = {name: listed(f"{name}_") for name in ("data", "explore", "bench", "docs", "dev")}
extras["paper"] = extras["data"] + listed("paper_")
extras["cluster"] = extras["paper"] + listed("cluster_")
extras["all"] = sorted({requirement for group in extras.values() for requirement in group})
statuses = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]
readme = here / "README.md"

# What is no module but belongs to the package: types, the weights of the digit networks, style sheets, templates.
data = ["py.typed", "*.json", "*.mplstyle", "*.css", "*.j2", "weights/*.safetensors", "weights/*.json"]


class BuildWithoutIndex(build_py):
    """`_modidx.py` is nbdev's index of the notebooks; nobody needs it who has the package alone."""

    def find_package_modules(self, package, package_dir):
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "_modidx"]


# Optional: where it cannot be built, the installation goes on and mean shift runs in PyTorch alone. The code is for GCC
# and Clang; CVI_PORTABLE=1 leaves it out elsewhere, too.
portable = os.name == "nt" or os.environ.get("CVI_PORTABLE", "0") not in ("", "0")
mean_shift = Extension(
    "cvi_nb.clustering._mean_shift",
    sources=["cvi_nb/clustering/_mean_shift.c"],
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"],
    optional=True,
)

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    project_urls={
        "Documentation": f"{settings['doc_host']}{settings['doc_baseurl']}",
        "Source": settings["git_url"],
        "Issues": f"{settings['git_url']}/issues",
        "Changelog": f"{settings['git_url']}/blob/{settings['branch']}/CHANGELOG.md",
    },
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_packages(include=[settings["lib_path"], f"{settings['lib_path']}.*"]),
    package_data={"": data},
    include_package_data=False,
    cmdclass={"build_py": BuildWithoutIndex},
    ext_modules=[] if portable else [mean_shift],
    python_requires=f">={settings['min_python']}",
    install_requires=listed(""),
    extras_require=extras,
    entry_points={"console_scripts": settings.get("console_scripts", "").split()},
    classifiers=[
        f"Development Status :: {statuses[int(settings['status']) - 1]}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Operating System :: OS Independent",
        "Programming Language :: C",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in settings["tested_python"].split()),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
