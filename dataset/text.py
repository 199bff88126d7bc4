"""Text files of users, lists and tables, as editors and spreadsheets save them."""

import codecs
import csv
import io

from utils.common.errors import UserError
from utils.common.files import read_file

DELIMITERS = ",;\t"     # of tables; spreadsheets take the one of their language


def read_text(path, what):
    """The text of a file in UTF-8 or, by its byte order mark, UTF-16. Raises `UserError`; what: the file, in words."""
    data = read_file(path, what)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected {what}, found: {error}; save it as UTF-8") from None


def read_csv(path, what):
    """Read a table with a header, separated by commas, semicolons or tabs.

    Returns:
        The columns' names, in lower case; and [(line number, {column: text})] of the rows that are not empty.

    Raises:
        UserError: if the file is no such table.
    """
    text = read_text(path, what)
    first, _, rest = text.partition("\n")
    skipped = first.strip().lower().startswith("sep=")      # a line for Excel
    if skipped:
        text, first = rest, rest.partition("\n")[0]
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        rows = [(reader.line_num + skipped, dict(zip(header, row, strict=False))) for row in reader if any(
            cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path}: expected {what}, found: {error}") from None
    return header, rows
