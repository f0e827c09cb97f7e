"""`effdet-fast doctor`: prints the diagnosis; exit status 1 if something is broken."""

from effdet_fast.diagnostics import diagnose


def main() -> int:
    report = diagnose()
    width = max(len(finding.name) for finding in report.findings)
    for finding in report.findings:
        mark = "FAILED " if finding.failed else ""
        print(f"{finding.name:<{width}}  {mark}{finding.value}")
        if finding.remedy:
            print(f"{'':<{width}}  -> {finding.remedy}")
    print("\nAll is well." if report.ok else "\nSomething is broken: see the lines marked FAILED.")
    return 0 if report.ok else 1
