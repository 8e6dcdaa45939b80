"""Certificates made on the fly."""

import subprocess
from pathlib import Path

from loraserve.security import TlsFiles


def certificate(directory: Path, name: str, san: str, issuer: str | None) -> TlsFiles:
    """A key and a certificate, signed by `issuer` or by itself; `ca` of the answer is "ca"."""
    key, cert = directory / f"{name}.key", directory / f"{name}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", key, "-out", cert]
    if issuer:
        command += ["-CA", directory / f"{issuer}.pem", "-CAkey", directory / f"{issuer}.key"]
        command += ["-addext", f"subjectAltName={san}", "-addext", "basicConstraints=CA:FALSE"]
    subprocess.run(command, check=True, capture_output=True)
    return TlsFiles(cert, key, directory / "ca.pem")
