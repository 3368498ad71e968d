"""What every section of the config is made of: the base class, and types with their ranges."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

__all__ = ["Count", "Fraction", "ImageSize", "Length", "Patterns", "PositiveInt", "Section", "Size", "machine"]

PositiveInt = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, le=1_000_000)]  # of a layer or an image; more is a slip of the finger
Length = Annotated[int, Field(ge=1, le=10**15)]  # images or steps
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def as_pair(value: Any) -> Any:
    """Read one side as a square: 224 means (224, 224)."""
    if isinstance(value, int):
        return (value, value)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("one number for a square, or two: [height, width]")
    return value


Sides = tuple[Size, Size]
ImageSize = Annotated[Sides, BeforeValidator(as_pair, json_schema_input_type=Size | Sides)]  # (height, width), px


def as_several(value: Any) -> Any:
    """Read one pattern as a list of one."""
    return (value,) if isinstance(value, str) else value


Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Several = Annotated[tuple[Pattern, ...], Field(max_length=100)]
Patterns = Annotated[Several, BeforeValidator(as_several, json_schema_input_type=Pattern | Several)]


def machine(default: Any, description: str, **rules: Any) -> Any:
    """Declare a setting that cannot change a result, so a resumed run may change it."""
    return Field(default=default, description=description, json_schema_extra={"may_change_on_resume": True}, **rules)


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where they would silently become 1 and 0."""
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("something else than true or false")
        return value
