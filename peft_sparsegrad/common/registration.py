"""The registration of the two methods with PEFT, which includes new members in its enum of methods.

PEFT has no entry points: `register_peft_method` only accepts names that are members of `PeftType`, and 58 of its
modules refer to that class. So the class has to get true new members and cannot be replaced.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, and add it if it is missing.

    Lookup by value, name and attribute, pickling, deep copies and JSON then work as for PEFT's own members.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(PeftType)  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Register a method under `name` with the prefix `name_`; a second call, as in a reload, replaces the first.

    Raises:
        RuntimeError: If another package has taken the name or a prefix that clashes with this one.
    """
    prefix = f"{name}_"
    taken = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType.__members__.get(name.upper()))  # pyright: ignore[reportArgumentType]
    if taken is not None and taken.__module__ != config_cls.__module__:
        raise RuntimeError(f"the PEFT method {name!r} is already registered by {taken.__module__}")
    for other, other_prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if (
            other != name.upper()
            and other_prefix
            and (prefix.startswith(other_prefix) or other_prefix.startswith(prefix))
        ):
            raise RuntimeError(f"the prefix {prefix!r} clashes with {other_prefix!r} of the PEFT method {other}")
    member = add_peft_type(name.upper())
    if taken is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
