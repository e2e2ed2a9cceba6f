"""Write a CycloneDX list of what an image contains: Debian packages and Python distributions. Run inside the image.

python sbom.py NAME > sbom.cdx.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata


def main(image: str) -> None:
    components = sorted((*debian_packages(), *python_distributions()), key=lambda c: c["purl"])
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": f"baton-{image}"}},
        "components": components,
    }
    json.dump(document, sys.stdout, indent=1)


def debian_packages() -> Iterator[dict[str, str]]:
    query = ["dpkg-query", "--show", "--showformat", "${Package}\t${Version}\t${Architecture}\n"]
    for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines():
        name, version, architecture = line.split("\t")
        purl = f"pkg:deb/debian/{name}@{version}?arch={architecture}"
        yield {"type": "library", "name": name, "version": version, "purl": purl}


def python_distributions() -> Iterator[dict[str, str]]:
    for found in metadata.distributions():
        name, version = found.metadata["Name"], found.version
        purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
        yield {"type": "library", "name": name, "version": version, "purl": purl}


if __name__ == "__main__":
    main(sys.argv[1])
