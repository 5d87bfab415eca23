"""Questions to a judge behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import os

import openai

from experiments.terminal import show
from peft_sparsegrad.cli.errors import InputError

from .judge_prompt import parse_rating

OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"
NO_KEY = "none"
ATTEMPTS = 2  # a judgment without a rating is asked for once more


def connect(args: argparse.Namespace) -> openai.OpenAI:
    """A client that repeats a request after an overload, a server's error or a lost connection, later each time."""
    # A server of one's own asks for no key, and the client will not start without one.
    client = openai.OpenAI(api_key=NO_KEY, base_url=args.base_url, max_retries=args.max_retries)
    client.api_key = _key(client, args.api_key_env)
    return client


def _key(client: openai.OpenAI, variable: str | None) -> str:
    """Return the key of the named variable, or `OPENAI_API_KEY` if the server is OpenAI's own, or no key.

    Raises:
        InputError: If the variable holds no key.
    """
    url = client.base_url
    is_openai = url.scheme == "https" and (url.host == OPENAI_HOST or url.host.endswith(f".{OPENAI_HOST}"))
    if variable is None and not is_openai:
        if os.environ.get(OPENAI_KEY):
            show("key", f"none is sent to {url.host}; --api-key-env {OPENAI_KEY} would send OpenAI's")
        return NO_KEY
    variable = variable or OPENAI_KEY
    if not os.environ.get(variable):
        raise InputError(f"the environment variable {variable} holds no key: set it, or give --base-url")
    return os.environ[variable]


def ask_for_rating(
    client: openai.OpenAI, system: str, user: str, args: argparse.Namespace
) -> tuple[str, float | None]:
    """The judgment and its rating, None where it still gave none when asked again."""
    judgment, rating = "", None
    for _ in range(ATTEMPTS):
        judgment = _complete(client, system, user, args)
        rating = parse_rating(judgment)
        if rating is not None:
            break
    return judgment, rating


def _complete(client: openai.OpenAI, system: str, user: str, args: argparse.Namespace) -> str:
    try:
        completion = client.chat.completions.create(
            model=args.judge,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
            temperature=0,
            max_tokens=args.max_tokens,
        )
        return completion.choices[0].message.content or ""
    except openai.OpenAIError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the judge at {client.base_url} did not answer: {reason}; what it judged is kept, start again to go on"
        ) from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{client.base_url} answered with no chat completion: is it the right --base-url?") from error
