"""What PyInstaller cannot see from the import statements of this package."""

from PyInstaller.utils.hooks import collect_data_files, copy_metadata  # type: ignore[import-untyped]

from timm_cmt import _FILES, _PUBLIC_NAMES

hiddenimports = sorted({f"timm_cmt.{file}" for file in (*_FILES.values(), *_PUBLIC_NAMES.values())})  # imported by name
datas = collect_data_files("timm_cmt") + copy_metadata("timm-cmt")  # torch finds us by the entry point in the metadata
module_collection_mode = "pyz+py"  # torch.jit.script reads the source
