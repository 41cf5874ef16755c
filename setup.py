"""What pyproject.toml cannot say tidily: the device code stands at the top level and ships inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fused_attn", "fused_attn.*"]), "fused_attn.kernels"],
    # `kernels` at the top level must never be installed under that name: it belongs to another distribution.
    package_dir={"fused_attn.kernels": "kernels"},
    package_data={"fused_attn": ["py.typed"], "fused_attn.tuning": ["tables/*.json"]},
    include_package_data=False,
    zip_safe=False,
)
