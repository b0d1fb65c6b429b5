"""Signatures of a bundle by OpenSSF Model Signing: an elliptic curve key, or a certificate and its chain.

The signature is a Sigstore bundle, ``model.sig``: an in-toto statement in a DSSE envelope, with the sha256 of
every file. Nothing is asked of any server.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import ConfigError, RetortError
from components.provenance.chain import hashes, short

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

SIGNATURE = "model.sig"
KEY, PASSWORD = "RETORT_SIGN_KEY", "RETORT_SIGN_PASSWORD"
TELLING = ("provenance/", "SHA256SUMS")
MARK = b"-----BEGIN CERTIFICATE-----"
ADVICE = "take the model from where it was signed, or name the key that you trust in registry.trusted_keys"


def private_key(named: str | None) -> Path | None:
    """The key to sign with: the parameter's, else ``$RETORT_SIGN_KEY``; None: nothing is signed.

    Raises:
        ConfigError: when it is not there.
    """
    place = named or os.environ.get(KEY, "")
    if not place:
        return None
    if not Path(place).is_file():
        raise ConfigError(
            f"registry.sign_key: {place}: no such file; expected a PEM file with an elliptic curve key, "
            "such as 'openssl ecparam -name prime256v1 -genkey -noout' prints"
        )
    return Path(place)


def sign(folder: Path, key: Path, certificate: Path | None = None, ignored: Sequence[str] = ()) -> None:
    """Sign every file of ``folder``; leaves ``model.sig`` there.

    Args:
        key: PEM, an elliptic curve of NIST; ``$RETORT_SIGN_PASSWORD`` opens an encrypted one.
        certificate: PEM, the key's own first, then those between it and the one that is trusted.
        ignored: names of files that may come or go.

    Raises:
        RetortError: when key and certificate cannot be used.
    """
    from model_signing import hashing, signing

    password = os.environ.get(PASSWORD, "")
    config = signing.Config().set_hashing_config(
        hashing.Config().set_ignored_paths(paths=[SIGNATURE, *ignored], ignore_git_paths=False)
    )
    try:
        if certificate is None:
            config.use_elliptic_key_signer(private_key=key, password=password.encode() or None)  # type: ignore[arg-type]
        else:
            with tempfile.TemporaryDirectory() as scratch:
                own, rest = _apart(certificate, Path(scratch))
                config.use_certificate_signer(
                    private_key=key, signing_certificate=own, certificate_chain=[rest]
                )
        config.sign(folder, folder / SIGNATURE)
    except (ValueError, TypeError) as error:
        raise RetortError(
            f"registry.sign_key: {key}: cannot sign with it ({_first(error)}); expected an elliptic curve "
            f"key (prime256v1, secp384r1 or secp521r1) in PEM, without a password or with that in {PASSWORD}"
        ) from None


def _apart(certificate: Path, scratch: Path) -> tuple[Path, Path]:
    """The first certificate of a PEM file, and the others, as files."""
    first, *others = [MARK + part for part in _bytes(certificate).split(MARK)[1:]] or [b""]
    if not others:
        raise ConfigError(
            f"registry.sign_certificate: {certificate}: expected two certificates in PEM at least, the "
            "key's own first, then the one that issued it"
        )
    own, rest = scratch / "own.pem", scratch / "rest.pem"
    own.write_bytes(first)
    rest.write_bytes(b"".join(others))
    return own, rest


def verify(folder: Path, trusted: Sequence[Path]) -> str:
    """Verify the signature of ``folder`` and every file in it; returns who signed, in words.

    Args:
        trusted: PEM files, each a public key or certificates of who may vouch for one.

    Raises:
        RetortError: naming what is at fault: no signature, a key that is not trusted, a certificate that
            is not valid, a file that changed, is missing or was added.
    """
    from cryptography.exceptions import InvalidSignature
    from model_signing import hashing, verifying

    file = folder / SIGNATURE
    material = _material(file)
    config = verifying.Config()
    if "publicKey" in material:
        key, said = _key(file, material["publicKey"].get("hint", ""), trusted)
        config.use_elliptic_key_verifier(public_key=key)
    else:
        said = _vouched(file, material, trusted)
        config.use_certificate_verifier(
            certificate_chain=[path for path in trusted if _holds_certificates(path)]
        )
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False))
    try:
        config.verify(folder, file)
    except InvalidSignature:
        raise RetortError(
            f"{file}: the signature is not that of {said}: the file was changed, or signed by another key; "
            f"{ADVICE}"
        ) from None
    except Exception as error:  # noqa: BLE001 - OpenSSL's errors are plain Exceptions
        differs = difference(signed(file), found(folder, _ignored(file)))
        raise RetortError(f"{folder / differs[0]}: {differs[1]}; {ADVICE}" if differs else
                          f"{file}: {_first(error)}; {ADVICE}") from None  # fmt: skip
    return said


def found(folder: Path, ignored: Iterable[str]) -> dict[str, str]:
    """Hex sha256 of every file of a folder but its signature, and those ``ignored``, by name."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    return hashes(folder, sorted(name for name in names if name not in {SIGNATURE, *ignored}))


def _ignored(file: Path) -> list[str]:
    return list(_predicate(file).get("serialization", {}).get("ignore_paths", []))


def signed(file: Path) -> dict[str, str]:
    """What a signature says of each file, by name; whether it is anybody's is not looked at."""
    try:
        return {one["name"]: one["digest"] for one in _predicate(file)["resources"]}
    except (KeyError, TypeError):
        return {}


def _predicate(file: Path) -> dict[str, Any]:
    """What a signature is about; empty where it cannot be read."""
    try:
        payload = base64.b64decode(json.loads(file.read_text(encoding="utf-8"))["dsseEnvelope"]["payload"])
        predicate = json.loads(payload)["predicate"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return predicate if isinstance(predicate, dict) else {}


def difference(said: Mapping[str, str], there: Mapping[str, str]) -> tuple[str, str] | None:
    """The first file that is not as ``said``, and how it differs; None: they agree.

    What only tells of the others comes last: it differs wherever they do.
    """
    for name in sorted({*said, *there}, key=lambda one: (one.startswith(TELLING), one)):
        if name not in there:
            return name, "is missing, and belongs to it"
        if name not in said:
            return name, "is no part of it: one file too many"
        if said[name] != there[name]:
            return name, f"changed: its sha256 is {short(there[name])}, not {short(said[name])}"
    return None


def _material(file: Path) -> dict[str, Any]:
    """The verification material of a signature that is written as its signer writes it, byte for byte.

    JSON and base64 say the same in several ways; all but one of them are refused, so that no byte can change
    unseen.
    """
    from model_signing._signing.sign_sigstore_pb import Signature

    if not file.is_file():
        raise RetortError(
            f"{file}: no such file: this model is not signed; registry.sign_key signs the next one"
        )
    try:
        text = file.read_text(encoding="utf-8")
        material = json.loads(text)["verificationMaterial"]
        again = Signature.read(file).bundle.to_json()
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise RetortError(f"{file}: not a signature ({_first(error)}); {ADVICE}") from None
    if again != text or not isinstance(material, dict):
        raise RetortError(f"{file}: changed since it was written: not as Model Signing writes it; {ADVICE}")
    return material


def fingerprint(key: Any) -> str:
    """How a signature calls its public key: the sha256 of its PEM."""
    from cryptography.hazmat.primitives import serialization

    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _key(file: Path, hint: str, trusted: Sequence[Path]) -> tuple[Path, str]:
    from cryptography.hazmat.primitives import serialization

    known = {}
    for path in trusted:
        if _holds_certificates(path):
            continue
        try:
            known[fingerprint(serialization.load_pem_public_key(_bytes(path)))] = path
        except ValueError:
            raise ConfigError(
                f"registry.trusted_keys: {path}: neither a public key nor a certificate in PEM; 'openssl "
                "ec -in KEY -pubout' prints the one of a private key"
            ) from None
    if hint not in known:
        names = ", ".join(map(str, known.values())) or "none"
        raise RetortError(
            f"{file}: signed by the key {hint[:16]}..., which is not known (trusted: {names}); {ADVICE}"
        )
    return known[hint], f"the key {hint[:16]}... ({known[hint]})"


def _vouched(file: Path, material: dict[str, Any], trusted: Sequence[Path]) -> str:
    """Whether certificates lead from the signature to a trusted one, all of them valid now; says whose it is.

    Model Signing looks at the time at which the first began to be valid: it has no other that it could
    trust. Here the clock of this machine decides, so an expired certificate is refused.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        listed = material["x509CertificateChain"]["certificates"]
        chain = [x509.load_der_x509_certificate(base64.b64decode(one["rawBytes"])) for one in listed]
    except (KeyError, TypeError, ValueError) as error:
        raise RetortError(f"{file}: holds no key and no certificates ({_first(error)}); {ADVICE}") from None
    known = [
        one
        for path in trusted
        if _holds_certificates(path)
        for one in x509.load_pem_x509_certificates(_bytes(path))
    ]
    if not chain or not known:
        raise RetortError(f"{file}: signed with a certificate, and none is known to vouch for it; {ADVICE}")
    for one, above in itertools.pairwise(chain):
        try:
            one.verify_directly_issued_by(above)
        except (ValueError, TypeError, InvalidSignature):
            raise RetortError(
                f"{file}: the certificate of {_subject(one)} was not issued by the next one, "
                f"{_subject(above)}; {ADVICE}"
            ) from None
    root = next((one for one in known if one == chain[-1] or _issued(chain[-1], one)), None)
    if root is None:
        raise RetortError(
            f"{file}: the certificate of {_subject(chain[0])} leads to "
            f"{chain[-1].issuer.rfc4514_string()}, which is not known; {ADVICE}"
        )
    now = datetime.now(UTC)
    for one in [*chain, root]:
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            word = "expired" if now > one.not_valid_after_utc else "not valid yet"
            raise RetortError(
                f"{file}: the certificate of {_subject(one)} is {word}: valid from "
                f"{one.not_valid_before_utc:%Y-%m-%d %H:%M} to {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, "
                f"and this machine's clock says {now:%Y-%m-%d %H:%M}; set it right, or have it signed again"
            )
    return f"the certificate of {_subject(chain[0])}"


def _issued(one: Certificate, by: Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        one.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _subject(certificate: Certificate) -> str:
    return f"'{certificate.subject.rfc4514_string()}'"


def _holds_certificates(path: Path) -> bool:
    return MARK in _bytes(path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"registry.trusted_keys: {path}: {(error.strerror or str(error)).lower()}"
        ) from None


def places(named: Iterable[str]) -> list[Path]:
    """The files of trusted keys; a folder stands for every ``.pem`` and ``.pub`` in it."""
    found: list[Path] = []
    for name in named:
        path = Path(name)
        found += (
            sorted(one for one in path.iterdir() if one.suffix in (".pem", ".pub"))
            if path.is_dir()
            else [path]
        )
    return found


def _first(error: BaseException) -> str:
    """The first line of an error, short."""
    return (next(iter(str(error).splitlines()), "") or type(error).__name__)[:200]
