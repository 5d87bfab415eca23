"""Tune a chat model on conversations, let it answer MT-Bench questions, have a judge grade them, and talk to it."""
